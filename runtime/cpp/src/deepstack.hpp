// Deepstack (arXiv 2406.04334): a picture enters not only where the prompt does, but also behind the first layers. The
// C++ side of runtime/deepstack.py.
//
// The image graph gives a row of a picture in 1 + L parts of D numbers. The first part enters the decoder in the row's
// place. Part 1 + i is added to what layer i gives there, so it is an input `deepstack.<i>` of the half that has layer
// i.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "image.hpp"
#include "subgraph.hpp"

namespace autosteer {

/// Rows (n, (1 + L) * D) of each picture, by their first position.
using PictureRows = std::map<int64_t, std::shared_ptr<const Rows>>;

/// What one prompt's pictures add to the output of the first decoder layers.
class Deepstack {
 public:
  /// `layers`: L. `width`: D.
  Deepstack(int64_t layers, int64_t width, PictureRows pictures)
      : layers_(layers), width_(width), pictures_(std::move(pictures)), nothing_({1, 1, width}) {}

  /// Inputs of a decoder half with `layers`, for a pass over `count` positions from `first` on: (1, count, D) each,
  /// valid until the next call; or one row of zeros, which is added to all, where no picture stands.
  Call::Bound inputs(const std::array<int64_t, 2>& layers, int64_t first, int64_t count) {
    Call::Bound inputs;
    const auto stands = [&](const auto& picture) {
      return picture.first < first + count && first < picture.first + picture.second->count();
    };
    const bool any = std::any_of(pictures_.begin(), pictures_.end(), stands);
    added_.clear();
    added_.reserve(static_cast<size_t>(layers_));  // or the addresses of its elements would change
    for (int64_t layer = layers[0]; layer < std::min(layers[1], layers_); ++layer) {
      if (any) added_.push_back(added(layer, first, count));
      inputs.emplace_back("deepstack." + std::to_string(layer), any ? &added_.back().value() : &nothing_.value());
    }
    return inputs;
  }

 private:
  /// (1, count, D): what the positions from `first` on add to the output of `layer`.
  Tensor<float> added(int64_t layer, int64_t first, int64_t count) const {
    Tensor<float> all({1, count, width_});
    for (const auto& [at, rows] : pictures_) {
      const int64_t end = std::min(first + count, at + rows->count());
      for (int64_t position = std::max(first, at); position < end; ++position) {
        const float* part = rows->row(position - at) + (1 + layer) * width_;
        std::copy(part, part + width_, all.data() + (position - first) * width_);
      }
    }
    return all;
  }

  int64_t layers_, width_;
  PictureRows pictures_;
  Tensor<float> nothing_;
  std::vector<Tensor<float>> added_;
};

}  // namespace autosteer
