"""What the language model reads: the embodiment prompt of Qwen-VLA, section 2.3, in a chat template."""

from rlvla_envs.base import EnvSpec


def embodiment_prompt(spec: EnvSpec, instruction: str, num_actions: int | None = None) -> str:
    """The paper's words, with the suite's conventions filled in; it asks for a chunk, or for ``num_actions``.

    Examples:
        >>> from rlvla_envs.base import ActionComponent, Camera, EnvSpec
        >>> spec = EnvSpec(suite="s", task="t", robot="WidowX", action=(), cameras=(), control_hz=5.0,
        ...                chunk_size=4, max_episode_steps=60, num_evaluation_states=24)
        >>> print(embodiment_prompt(spec, "put the carrot on the plate"))
        The robot is WidowX with single arm. The control frequency is 5 Hz. Please predict the next 4 control \
actions to execute the following task: put the carrot on the plate.
    """
    return (
        f"The robot is {spec.robot} with {spec.arms}. The control frequency is {spec.control_hz:g} Hz. "
        f"Please predict the next {num_actions or spec.chunk_size} control actions to execute the following task: "
        f"{instruction.rstrip('.')}."
    )


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's, less the parts for tools and thinking: one user turn with the images, then the prompt."""
