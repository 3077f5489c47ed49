"""`python -m kernels.targets`: every kernel compiled for GPUs that need not be there, its machine code held to budgets.

plans.py says what is compiled, and each kernel's budget: a new kernel is added there. command.py compiles and prints;
compiled.py, pointers.py and sass.py read the machine code; estimate.py, with architectures.py, turns it into clocks.
"""
