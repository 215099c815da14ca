"""Names that no table can have, told without torch: collections keep tables in a ModuleDict."""

_PUBLIC = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu
    cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter
    get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children
    named_modules named_parameters parameters pop register_backward_hook register_buffer
    register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule share_memory state_dict to to_empty train training type update values xpu
    zero_grad
"""
ATTRIBUTES = frozenset(_PUBLIC.split())


def name_problem(name: str) -> str | None:
    """Return why no table can have a name, or None.

    Example::

        name_problem("type")  # "'type' is an attribute of torch.nn.ModuleDict ..."
    """
    if not name or "." in name:
        return f"'{name}': a name of a table is part of a parameter's name, so it has no dot"
    if name in ATTRIBUTES:
        return (
            f"'{name}' is an attribute of torch.nn.ModuleDict, which keeps the tables; rename the "
            f"column, for instance to '{name}_id'"
        )
    return None
