// A dialogue as the decoder reads it: what prompt_encoder.hpp makes and generation.hpp runs. The C++ side of
// runtime/encoded_prompt.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "deepstack.hpp"
#include "image.hpp"
#include "rotary.hpp"

namespace autosteer {

/// Identifies a position: "" and a token id, or a picture's digest and a row of it.
using Key = std::pair<std::string, int64_t>;

/// A picture or a video of a prompt, or a group of the video's frames.
struct Seen {
  std::string sha256;  // of its pixels, or of the video's frames as they are encoded; see `digest`
  std::string key;     // its digest, and how it is encoded
  std::shared_ptr<const std::vector<Laid>> laid;
  size_t first, last;                          // its own of `laid`: the first, and one past the last
  std::optional<std::array<int64_t, 2>> grid;  // (rows, columns) in which its rows stand, if they do
  std::vector<int64_t> times = {0};  // of the groups of a video's frames, whose rows stand in such a grid each
  int64_t row = 0;                   // its first row in the picture or video: of a further group above 0
  bool video = false;

  int64_t rows() const {
    int64_t count = 0;
    for (size_t i = first; i < last; ++i) {
      count += static_cast<int64_t>(laid->at(i).ids.size()) + laid->at(i).rows.count();
    }
    return count;
  }
};

/// By judged turn: the positions whose mean the prober reads, ascending; empty if the prompt is too short.
using Probed = std::vector<std::vector<int64_t>>;

/// Whether the prober can read every judged turn.
inline bool is_probed(const Probed& turns) {
  const auto is_empty = [](const auto& positions) { return positions.empty(); };
  return !turns.empty() && std::none_of(turns.begin(), turns.end(), is_empty);
}

/// A dialogue as the decoder's input: S positions.
struct EncodedPrompt {
  Rows inputs_embeds;              // (S, D)
  std::vector<int64_t> token_ids;  // of the text only; the repetition penalty reads them
  /// S of them. Two prompts that share a prefix of keys share those positions' keys and values.
  std::vector<Key> keys;
  std::vector<Position> positions;  // S of them, for rotary
  Probed probed;
  std::vector<Seen> seen = {};  ///< pictures, videos, and the groups of videos' frames, in the prompt's order
  PictureRows pictures = {};    ///< for models with deepstack

  /// Rows (n, D) of a picture follow; or (n, (1 + L) * D), whose first parts do.
  void add_picture(const std::shared_ptr<const Rows>& rows) {
    if (rows->width == inputs_embeds.width) return inputs_embeds.append(rows->row(0), rows->count());
    pictures[inputs_embeds.count()] = rows;
    for (int64_t i = 0; i < rows->count(); ++i) inputs_embeds.append(rows->row(i), 1);
  }
};

}  // namespace autosteer
