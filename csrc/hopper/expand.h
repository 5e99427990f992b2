// `expand` on Hopper; see expand_sm90.cu.
#pragma once

#include "../ops.h"

namespace lorasb::hopper {

// Whether the kernel takes these operands on the current device.
bool takes_expand(const ExpandParams& params);

// `params` is one that `takes_expand` accepts.
Launch expand(const ExpandParams& params, cudaStream_t stream);

}  // namespace lorasb::hopper
