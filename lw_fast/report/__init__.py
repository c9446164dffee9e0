"""lw-fast report: runs and sweeps as one HTML page that needs no network.

report_data.py     folders -> entries, tables, maps, fronts, predictions (no plotting)
report_plots.py    entries -> figures (matplotlib), as SVG that follows the page's colours
report_page.py     all of it -> HTML; page.css and page.js go into it
report_main.py     the command line, --watch
"""
