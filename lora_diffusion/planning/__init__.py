"""How much memory a model takes, found from shapes alone: fake tensors run through the model's own code.

fake_copy.py: a model without values · live_bytes.py: counting what is alive · allocator.py: what CUDA's allocator makes
of it · workspace.py: what kernels take on the side · stored.py: weights in fewer bits · plan.py: `ld.plan`.
"""
