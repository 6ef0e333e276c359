"""What happens in one call of a transformed model: facts, masks and plans, hooks, processors. Independent of any model.

``flexclear.families`` describes where each model's tokens and grid are; ``flexclear.parallel`` implements ``partition``.
"""
