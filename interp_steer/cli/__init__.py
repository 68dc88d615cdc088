"""The command line: reads what is asked, assembles the other packages, and prints.

    main              which commands there are; errors as one line and an exit code
    common            shared options, output files, tables; loads a model
    demo              runs `data/demo.yaml` and prints how the best settings answer
    generate          answers prompts, unsteered and steered
    sweep             many settings by layer and strength, claiming nothing
    caa               contrastive activation addition from a file of questions
    patch             where an answer is kept, from one pair of prompts
    chat              a conversation with the steered and the unsteered model
    direction         makes, chooses, lists and shows directions
    labels            fetches, stores and searches feature labels
    features          ranks SAE features, saves their directions, checks an SAE (`features`, `sae`)
    study             plans and runs studies, writes their tables and reports (`study`, `report`)
    ablate            takes parts of the model out, patches, and traces steering
    ablation_request  what `ablate` is asked, checked before a model loads
    verify            checks the toolkit on a model
    terminal          completion, and hints for wrong calls

Start from `main.main()`, which the command `interp-steer` calls.
"""
