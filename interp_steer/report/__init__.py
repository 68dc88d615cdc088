"""From a run's folder to findings, pictures and one page. Nothing here needs a model or torch.

    run        Run: what a folder holds of a study, as a table
    evidence   its rows as effects, intervals and p-values
    findings   Findings: the tables that a report is made of, and the verdict
    chosen     which setting a run chose, or why none
    report     `write`: the page
    methods    how the run was done, in words
    texts      the text browser of a page: from a setting to its texts
    brief      the short form for a notebook
    page       templates, tables, pictures and numbers of a page (templates/)
    marks      what pictures share: colours, axes, legends, files
    spots      the settings of a grid with their places
    heat       the grid as a heat map
    plots      lines and strips: curves, layers, controls
    damage     effect against damage, and the Pareto front
    maps       pictures of patching and tracing

Start at `Run(folder).findings()`, or `report.write(run)`.
"""
