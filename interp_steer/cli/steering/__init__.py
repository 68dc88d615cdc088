"""Commands that steer: texts under interventions, and the directions that they take.

generate   answers prompts, unsteered and steered
chat       a conversation with the steered and the unsteered model
sweep      many settings by layer and strength, claiming nothing
caa        contrastive activation addition from a file of questions
direction  makes and chooses directions
stored     lists directions, and shows them
demo       runs `data/demo.yaml` and prints how the best settings answer
"""
