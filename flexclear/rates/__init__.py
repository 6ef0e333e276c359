"""How fast a machine computes, measured or published, and what follows for a step: what ``explain`` predicts with."""
