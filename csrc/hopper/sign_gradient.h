// `sign_gradient` on Hopper; see sign_gradient_sm90.cu.
#pragma once

#include "../ops.h"

namespace lorasb::hopper {

// Whether the kernel takes these operands on the current device.
bool takes_sign_gradient(const SignGradientParams& params);

// `params` is one that `takes_sign_gradient` accepts.
Launch sign_gradient(const SignGradientParams& params, cudaStream_t stream);

}  // namespace lorasb::hopper
