"""GPT-2 XL finetuned on Shakespeare: 20 steps, constant learning rate."""

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # the best validation loss comes after a few steps

wandb_project = "shakespeare"
wandb_run_name = "ft-gpt2-xl"

dataset = "shakespeare"
init_from = "gpt2-xl"

# 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens a step; an epoch is 9.2 steps.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
