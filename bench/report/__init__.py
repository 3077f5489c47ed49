"""`python -m bench.report`: results files as one comparison, in Markdown, on a page, in pictures; or two commits.

digest.py takes from the files what is shown, estimates.py adds the roofline of devices that nobody measured, tables.py
and figures.py say it, layout.py and scene.py draw, page.py binds. compare.py judges two commits.
"""
