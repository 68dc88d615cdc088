"""What a run's folder holds, for those who write it and those who read it. No model, no torch.

    rows       Results: a file of rows that is appended to and never rewritten
    roles      settings, and the parts that planned rows play
    declared   Declared: what a metric is, as a manifest keeps it
    built_in   the declarations of the metrics that come with the package
    words      where the words of a concept stand in a text

Start at `rows.Results`.
"""
