"""The mathematics of RL fine-tuning for flow-matching policies: tensors in, tensors out.

Axes, everywhere: B environments or rows, T decisions, M minibatch, H actions in a chunk, K action channels
(padded), N denoising steps.
"""
