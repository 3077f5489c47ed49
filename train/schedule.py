"""The learning rate of an iteration: linear warmup, then a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)."""

import math

from train.config import TrainConfig


def learning_rate(iter_num: int, config: TrainConfig) -> float:
    """The rate that iteration `iter_num`, counted from 0, is trained with; nanoGPT's schedule."""
    if not config.decay_lr:
        return config.learning_rate
    # 1. warmup: never 0, not even in the first iteration
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / (config.warmup_iters + 1)
    # 2. after the decay (also where the warmup leaves no room for one)
    if iter_num > config.lr_decay_iters or config.lr_decay_iters == config.warmup_iters:
        return config.min_lr
    # 3. between the two: half a period of a cosine
    done = (iter_num - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)
