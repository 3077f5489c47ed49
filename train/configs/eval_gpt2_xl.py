"""The loss of OpenAI's GPT-2 XL (1558M) on OpenWebText."""

init_from = "gpt2-xl"
eval_only = True
batch_size = 8
eval_iters = 500  # 4 million tokens of each split
