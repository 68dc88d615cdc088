"""Studies: a declared grid of steered rows with its controls, carried out in a folder that resumes.

- `study`: `Study`, a design that can be run
- `design`: what a study declares, its checks, and the cells that follow
- `cell`: controls, prompts in place of steering, cells and planned rows
- `fields`: fields as people write them, in the one form that a study keeps
- `file`: a study as a YAML file
- `modules`: Python files that define further metrics
- `measured`: what was run of a chunk, and what metrics read of it
- `metrics`: functions from what was run to a number for each row
- `plan`: rows, chunks, memory and time, before anything runs
- `stages`: which rows run first, how a cell is chosen, and which controls it gets
- `chunk`: rows that run together, and the mapper that runs them in this process
- `on_ray`: the mapper that runs them on Ray actors
- `description`: what a run's folder says of its rows
- `execution`: runs the stages, and of each the rows that are missing

Start with `Study(...).run(model, folder)`, or with `StudyFile.read(path).study(model)`.
"""
