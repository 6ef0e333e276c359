"""How fast a machine computes, measured or published, and the step times that follow: the basis of ``explain``."""
