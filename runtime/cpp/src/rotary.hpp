// Rotary position embedding: where a prompt's rows stand, and the tables that GroupQueryAttention rotates by. The C++
// side of runtime/rotary.py.
//
// A row of text has one position. A model with multimodal rotary embedding (mrope) gives every row three: time, row and
// column. They are equal for text. The rows of a picture have one time, and the rows and columns of its grid; those of
// a video have a time for each group of frames. Text after it goes on behind the largest row or column, however long
// the video is. Each frequency reads one of the three.
//
// Some models have other frequencies for long prompts (longrope): for all rows of a prompt and its answer, or for none.
// Some have others in layers with a window (Gemma 3). Those layers read tables of their own.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "manifest_format.hpp"
#include "subgraph.hpp"

namespace autosteer {

using Position = std::array<int64_t, 3>;  ///< of a row: time, row, column

/// Gives the rows of a prompt their positions, from its beginning.
class PositionCounter {
 public:
  explicit PositionCounter(const RotarySpec& spec) : has_grids_(!spec.axes.empty()) {}

  /// `count` rows of text; or of a picture, for a model whose pictures count as text does.
  void text(int64_t count) {
    for (int64_t i = 0; i < count; ++i, ++next_) positions.push_back({next_, next_, next_});
  }

  /// `count` rows of a picture or a video. `grid`: the (rows, columns) in which they stand, nothing where they stand in
  /// none. `times`: one for each group of a video's frames, whose rows stand in such a grid each.
  void picture(int64_t count, const std::optional<std::array<int64_t, 2>>& grid, const std::vector<int64_t>& times) {
    if (!grid || !has_grids_) return text(count);
    for (const int64_t time : times) {
      for (int64_t i = 0; i < (*grid)[0] * (*grid)[1]; ++i) {
        positions.push_back({next_ + time, next_ + i / (*grid)[1], next_ + i % (*grid)[1]});
      }
    }
    next_ += std::max((*grid)[0], (*grid)[1]);
  }

  std::vector<Position> positions;  ///< of all rows so far

 private:
  bool has_grids_;
  int64_t next_ = 0;
};

/// Tables (capacity, frequencies) for one prompt and its answer. Their rows are computed as they are needed. `spec`
/// must outlive it.
class RotaryTables {
 public:
  static constexpr int64_t kBlock = 128;  ///< rows are computed at least so many at a time, as an answer grows

  /// `positions`: of the prompt's rows. The rows of the answer go on behind the last. `first`: the first row that
  /// will be read.
  RotaryTables(const RotarySpec& spec, std::vector<Position> positions, int64_t capacity, int64_t first)
      : spec_(spec), positions_(std::move(positions)), capacity_(capacity), filled_(first) {
    const std::vector<int64_t> shape = {capacity, static_cast<int64_t>(spec.frequencies.size())};
    for (const auto& [kind, frequencies] : spec.by_table(static_cast<int64_t>(positions_.size()))) {
      tables_.push_back({kind, *frequencies, Tensor<float>(shape), Tensor<float>(shape)});
    }
    if (!positions_.empty()) {
      following_ = *std::max_element(positions_.back().begin(), positions_.back().end()) + 1;
    }
  }

  /// Compute the rows of the first `total` positions, and some more, if they are not there yet.
  void extend(int64_t total) {
    if (total <= filled_) return;
    const int64_t last = std::min(std::max(total, filled_ + kBlock), capacity_);
    const auto length = static_cast<int64_t>(positions_.size());
    for (; filled_ < last; ++filled_) {
      const int64_t answered = following_ + filled_ - length;
      const Position at = filled_ < length ? positions_[static_cast<size_t>(filled_)]
                                           : Position{answered, answered, answered};
      for (Table& table : tables_) fill(table, static_cast<size_t>(filled_), at);
    }
  }

  /// Inputs of a decoder half.
  std::vector<std::pair<std::string, const Ort::Value*>> inputs() const {
    std::vector<std::pair<std::string, const Ort::Value*>> inputs;
    for (const Table& table : tables_) {
      inputs.emplace_back(table.kind + "cos_cache", &table.cos.value());
      inputs.emplace_back(table.kind + "sin_cache", &table.sin.value());
    }
    return inputs;
  }

 private:
  struct Table {
    std::string kind;
    const std::vector<double>& frequencies;
    Tensor<float> cos, sin;
  };

  void fill(Table& table, size_t row, const Position& at) const {
    const size_t width = table.frequencies.size();
    const auto scale = static_cast<float>(spec_.scale);
    for (size_t i = 0; i < width; ++i) {
      const int64_t position = at.at(spec_.axes.empty() ? 0 : static_cast<size_t>(spec_.axes[i]));
      const float angle = static_cast<float>(position) * static_cast<float>(table.frequencies[i]);
      const size_t cell = row * width + i;
      // rounded from double, where all libraries agree to the last bit that counts: the tables are Python's
      table.cos.data()[cell] = static_cast<float>(std::cos(static_cast<double>(angle))) * scale;
      table.sin.data()[cell] = static_cast<float>(std::sin(static_cast<double>(angle))) * scale;
    }
  }

  const RotarySpec& spec_;
  std::vector<Position> positions_;
  int64_t capacity_, filled_;
  int64_t following_ = 0;  // the position of the first row after the prompt
  std::vector<Table> tables_;
};

}  // namespace autosteer
