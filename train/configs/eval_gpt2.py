"""The loss of OpenAI's GPT-2 124M on OpenWebText."""

init_from = "gpt2"
eval_only = True
batch_size = 8
eval_iters = 500  # 4 million tokens of each split
