// Patches of pictures and videos.
#include "types.cuh"

constexpr int PATCH_THREADS = 256;
constexpr unsigned CHANNELS = 3;
constexpr unsigned PIXEL_LEVELS = 256;

// Patches of RGB frames. A pixel has one of 256 levels in its channel, so that what it becomes is looked up: the host
// normalizes and rounds once, and no rounding of this device's own is in it.
// pixels: [num_frames, grid_h size, grid_w size, 3], num_frames at least 1; where patches need more frames, the last is repeated.
// levels: [3, 256]. order: [grid]; row i of `out` is patch order[i], counted row by row over (time, height, width).
// out: [grid, 3 temporal size size], columns (channel, frame in patch, y, x).
// Grid: rows of `out`. Block: 256.
extern "C" __global__ void __launch_bounds__(PATCH_THREADS)
    patches(const unsigned char* __restrict__ pixels, unsigned num_frames, unsigned grid_h, unsigned grid_w, unsigned size,
            unsigned temporal, const bf16* __restrict__ levels, const unsigned* __restrict__ order,
            bf16* __restrict__ out) {
  const unsigned patch = order[blockIdx.x];
  const unsigned first_frame = patch / (grid_h * grid_w) * temporal;
  const unsigned top = patch / grid_w % grid_h * size;
  const unsigned left = patch % grid_w * size;
  const size_t row_len = static_cast<size_t>(grid_w) * size * CHANNELS;
  const size_t frame_len = row_len * grid_h * size;
  const unsigned cols = CHANNELS * temporal * size * size;
  bf16* const to = out + static_cast<size_t>(blockIdx.x) * cols;
  for (unsigned col = threadIdx.x; col < cols; col += PATCH_THREADS) {
    const unsigned x = col % size;
    const unsigned y = col / size % size;
    const unsigned frame = min(first_frame + col / (size * size) % temporal, num_frames - 1);
    const unsigned channel = col / (size * size * temporal);
    const unsigned char pixel = pixels[frame * frame_len + (top + y) * row_len + (left + x) * CHANNELS + channel];
    to[col] = levels[channel * PIXEL_LEVELS + pixel];
  }
}
