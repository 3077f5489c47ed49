"""The default job without a GPU: 0.8M parameters, Python's own documentation."""

dataset = "docs"  # built from what every Python ships: no network, nothing to prepare
eval_interval = 250
eval_iters = 20
log_interval = 10

wandb_project = "docs"
wandb_run_name = "cpu-gpt"

batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # too small to learn the corpus by heart

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000

compile = False  # compiling would take a good part of the few minutes that the run does
