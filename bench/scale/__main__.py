"""python -m bench.scale"""

from bench.scale.command import main
from train.errors import run

run(main)
