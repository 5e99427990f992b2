// The kernels of the product onto the rank in one mode, in a file of their own so that the modes are
// compiled side by side.
#include "rank_launch.cuh"

namespace lorasb {

template size_t rank_product_workspace<RankMode::FORWARD>(DType, int, int64_t, int64_t, int);
template Launch rank_product<RankMode::FORWARD>(DType, RankProductParams, void*, const char*,
                                            cudaStream_t);

}  // namespace lorasb
