"""What a planned row is to its study: its setting, and the part that it plays."""

SETTING = ("direction", "operator", "site", "level", "scope")
Setting = tuple[str, str, str, str, str]
"""Direction, operator, site, level and scope as a study declares them; "" where there is none."""

ROLES = {
    "unsteered": "no intervention",
    "grid": "every setting, on the selection prompts",
    "null_grid": "the same grid with random directions, on the selection prompts",
    "chosen": "the chosen setting, on the held-out prompts",
    "flip": "the chosen setting with the coefficient's sign turned",
    "wrong_layer": "the chosen setting's direction half the model away",
    "random": "random directions of the same norm in the chosen setting",
    "features": "other features of the SAE, alike in density and largest activation",
    "shuffled": "directions from the same prompts with shuffled labels",
    "null": "random directions, each in the setting that it chose for itself",
}
