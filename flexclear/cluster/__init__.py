"""Jobs of many images on the GPUs of a Ray cluster: ``flexclear generate``, ``data generate`` and ``data cache`` with ``--ray``.

An actor per GPU holds a loaded pipeline. The process that was started checks every node before work begins, hands out
calls, and alone writes what comes back: nodes need the model's files, not the folder of the images.

One image on several GPUs is ``flexclear.parallel``'s.
"""
