"""python -m kernels.targets"""

from kernels.targets.command import run

if __name__ == "__main__":  # its worker processes import this module too
    run()
