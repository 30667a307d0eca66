"""The operators' schemas, for the namespaces that are defined in Python.

csrc/schemas.cpp has the same and says what they mean; it is not there to be read where the package is installed, and an
install may lack the library. tests/ops/test_completeness.py holds the two together.
"""

from __future__ import annotations

import functools

import torch

SCHEMAS: dict[str, str] = {
    "conv2d_relu": (
        "(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
        "SymInt groups, str activation) -> Tensor"
    ),
    "conv2d_add_relu": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor residual, SymInt[] stride, SymInt[] padding, "
        "SymInt[] dilation, SymInt groups, str activation) -> Tensor"
    ),
    "pointwise_conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, str activation) -> Tensor"
    ),
    "depthwise_conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
        "str activation) -> Tensor"
    ),
    "conv2d_backward": (
        "(Tensor grad_output, Tensor? output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation, SymInt groups, str activation, bool[] output_mask) -> (Tensor, Tensor, Tensor, "
        "Tensor)"
    ),
    "pointwise_conv2d_group": "(Tensor input, Tensor[] weights, Tensor[] biases, str activation) -> Tensor[]",
    "pointwise_conv2d_group_backward": (
        "(Tensor[] grad_outputs, Tensor[] outputs, Tensor input, Tensor[] weights, str activation, bool[] "
        "output_mask) -> (Tensor, Tensor[], Tensor[])"
    ),
    "depthwise_separable_conv2d": (
        "(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? "
        "pointwise_bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, str depthwise_activation, str "
        "pointwise_activation) -> Tensor"
    ),
    "depthwise_separable_conv2d_backward": (
        "(Tensor grad_output, Tensor? output, Tensor input, Tensor depthwise_weight, Tensor pointwise_weight,"
        " Tensor? depthwise_bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, str "
        "depthwise_activation, str pointwise_activation, bool[] output_mask) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor)"
    ),
    "add_relu": "(Tensor input, Tensor other, str activation) -> Tensor",
    "add_relu_backward": "(Tensor grad_output, Tensor output, str activation) -> Tensor",
    "local_response_norm": "(Tensor input, SymInt size, float alpha, float beta, float k, str activation) -> Tensor",
    "local_response_norm_backward": (
        "(Tensor grad_output, Tensor input, SymInt size, float alpha, float beta, float k, str activation) -> Tensor"
    ),
}


def _out(schema: str) -> str:
    arguments, result = schema.rsplit(") -> ", 1)
    return f"{arguments}, {result.replace('Tensor', 'Tensor(a!)')} out) -> ()"


WITH_OUT = ("conv2d_relu", "conv2d_add_relu", "pointwise_conv2d", "pointwise_conv2d_group")
SCHEMAS.update({f"{name}.out": _out(SCHEMAS[name]) for name in WITH_OUT})


@functools.cache
def argument_names(operator: str) -> tuple[str, ...]:
    """Of the operator, in order."""
    return tuple(argument.name for argument in torch._C.parse_schema(operator + SCHEMAS[operator]).arguments)
