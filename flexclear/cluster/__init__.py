"""Jobs of many images on the GPUs of a Ray cluster: ``flexclear generate``, ``data generate`` and ``data cache`` with ``--ray``.

An actor per GPU holds a loaded pipeline. The process that was started checks every node before work begins and hands out calls.
It alone writes the results, so nodes need the model's files, but not the folder of the images.

For one image on several GPUs, see ``flexclear.parallel``.
"""
