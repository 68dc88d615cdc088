"""The command line: reads what is asked, assembles the other packages, and prints.

    main       which commands there are; errors as one line and an exit code
    common     shared options, output files, tables; loads a model
    steering   commands that steer: generate, chat, sweep, caa, direction, demo
    causal     commands that ask what breaks without a part: ablate, patch
    labels     fetches, stores and searches feature labels
    features   ranks SAE features, saves their directions, checks an SAE (`features`, `sae`)
    study      plans and runs studies, writes their tables and reports (`study`, `report`)
    tune       the strength of every line for one amount of damage
    judge      ratings of a run's held-out answers
    verify     checks the toolkit on a model
    terminal   completion, and hints for wrong calls

Start from `main.main()`, which the command `interp-steer` calls.
"""
