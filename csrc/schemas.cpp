// Every operator of fastconv, on one screen. Python registers the rest of each one (fake, autograd,
// autocast, vmap) in fastconv/ops/<op>.py; the glue in cpu/ and cuda/ registers what computes it
// (common/<op>_operators.h).
//
// No argument has a default: torch drops defaulted arguments when it calls a kernel, and which ones
// depends on the torch version. The public Python functions supply the defaults.
//
// `activation` is "none", "relu" or "relu6". A `*_backward` entry that `output_mask` leaves out
// comes back as an empty tensor of size [0].
#include "common/stable.h"

// The emulator of the CUDA kernels in emulator builds this file under another name.
#ifndef FASTCONV_LIBRARY
#define FASTCONV_LIBRARY fastconv
#endif
#define FASTCONV_DEFINE_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)  // expands the name first

FASTCONV_DEFINE_LIBRARY(FASTCONV_LIBRARY, m) {
  // The operator and its overload "out", which writes the result into its last argument instead. That one is not called
  // by name, as torch.compile takes no `out=` but of dense tensors.
  const auto def_with_out = [&m](const std::string& name, const std::string& arguments, const std::string& result) {
    m.def((name + "(" + arguments + ") -> " + result).c_str());
    const std::string written = "Tensor(a!)" + result.substr(std::string("Tensor").size());
    m.def((name + ".out(" + arguments + ", " + written + " out) -> ()").c_str());
  };

  // activation(conv2d(input, weight) + bias [+ residual])
  def_with_out("conv2d_relu",
               "Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
               "SymInt[] dilation, SymInt groups, str activation",
               "Tensor");
  def_with_out("conv2d_add_relu",
               "Tensor input, Tensor weight, Tensor? bias, Tensor residual, SymInt[] stride, "
               "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation",
               "Tensor");
  def_with_out("pointwise_conv2d",
               "Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, "
               "str activation",
               "Tensor");
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] "
      "padding, "
      "SymInt[] dilation, str activation) -> Tensor");
  // Gradients of input, weight, bias and residual, for the four operators above. `output` is read
  // only for the activation's mask and may be left out when there is none.
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor? output, Tensor input, Tensor weight, SymInt[] "
      "stride, "
      "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, bool[] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // Several 1x1 convolutions of one input; as many biases as weights, or none. (Not Tensor?[], for
  // which torch's register_autograd knows no gradient.)
  def_with_out("pointwise_conv2d_group", "Tensor input, Tensor[] weights, Tensor[] biases, str activation", "Tensor[]");
  // Gradients of input, weights and biases; output_mask has these three entries. No outputs without
  // an activation.
  m.def(
      "pointwise_conv2d_group_backward(Tensor[] grad_outputs, Tensor[] outputs, Tensor input, "
      "Tensor[] weights, "
      "str activation, bool[] output_mask) -> (Tensor, Tensor[], Tensor[])");

  // pointwise_activation(conv1x1(depthwise_activation(depthwise(input))))
  m.def(
      "depthwise_separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, "
      "Tensor? depthwise_bias, Tensor? pointwise_bias, SymInt[] stride, SymInt[] padding, SymInt[] "
      "dilation, "
      "str depthwise_activation, str pointwise_activation) -> Tensor");
  // Gradients of the five tensors, in their order. The depthwise result is computed again, not
  // kept.
  m.def(
      "depthwise_separable_conv2d_backward(Tensor grad_output, Tensor? output, Tensor input, "
      "Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, str depthwise_activation, str pointwise_activation, "
      "bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // activation(input + other), of one shape and dtype
  m.def("add_relu(Tensor input, Tensor other, str activation) -> Tensor");
  // The gradient of input, which is also that of other: grad_output where the activation let the
  // value through
  m.def("add_relu_backward(Tensor grad_output, Tensor output, str activation) -> Tensor");

  // a / (k + alpha / size * sum of squares of a over `size` neighbouring channels) ^ beta, a = activation(input)
  m.def("local_response_norm(Tensor input, SymInt size, float alpha, float beta, float k, str activation) -> Tensor");
  m.def(
      "local_response_norm_backward(Tensor grad_output, Tensor input, SymInt size, float alpha, float beta, "
      "float k, str activation) -> Tensor");
}
