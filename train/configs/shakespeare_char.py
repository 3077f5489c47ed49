"""10.65M parameters on the characters of Shakespeare: minutes on a GPU."""

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 200
log_interval = 10

# A million characters are soon known by heart: keep the weights of the best validation loss.
always_save_checkpoint = False

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

# A small model stands a larger learning rate; a small batch (16,384 tokens) wants a longer memory in beta2.
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
