"""How fast a machine computes, measured or published, and what that means for a step: the basis of ``explain``'s predictions."""
