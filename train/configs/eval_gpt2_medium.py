"""The loss of OpenAI's GPT-2 medium (350M) on OpenWebText."""

init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500  # 4 million tokens of each split
