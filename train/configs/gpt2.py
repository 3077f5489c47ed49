"""GPT-2 124M on OpenWebText: 0.5M tokens a step, 300B in all."""

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens. The 40 are shared out among the ranks.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_project = "owt"
wandb_run_name = "gpt2-124M"
