"""What happens in one call of a transformed model: facts, masks and plans, hooks, processors. Knows no model by name.

``flexclear.families`` says of each model where its tokens and its grid are; ``flexclear.parallel`` implements
``partition``.
"""
