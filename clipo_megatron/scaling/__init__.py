"""What more nodes give: the same run on several numbers of nodes, measured and compared.

ladder    the runs, one a number of nodes and kind of scaling
measure   their metrics as tokens a second a GPU, shares of the phases, and efficiency
report    table, figures and plot
command   `clipo scale`
"""
