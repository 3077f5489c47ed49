"""python -m bench.report"""

from bench.report.command import main
from train.errors import run

run(main)
