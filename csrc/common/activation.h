// The activations that an epilogue can apply.
#pragma once

namespace fastconv {

enum class Activation { kNone, kRelu, kRelu6 };

}  // namespace fastconv
