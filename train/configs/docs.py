"""The default job on a GPU: 10.65M parameters, Python's own documentation."""

dataset = "docs"  # built from what every Python ships: no network, nothing to prepare
eval_interval = 250
eval_iters = 50
log_interval = 10

wandb_project = "docs"
wandb_run_name = "mini-gpt"

batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000
