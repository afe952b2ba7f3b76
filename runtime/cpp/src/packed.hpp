// Reads several texts in one pass of decoder_lower, and none of them sees another. The C++ side of runtime/packed.py.
//
//     rows of the caches    what all begin with | text 1 | text 2 | ...
//     a row of text 2 sees  all of it           | no     | itself, and those before it
//
// A pass over the ten words of a piece (pieces.hpp) takes a third of the time of one over a hundred words: the weights
// have to be read for either. So pieces share a pass. The rotary tables give each row its position in its own text, and
// the attention bias hides the others. The rows are overwritten by the next pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "encoded_prompt.hpp"
#include "generation.hpp"
#include "log.hpp"
#include "manifest.hpp"
#include "rotary.hpp"
#include "subgraph.hpp"

namespace autosteer {

constexpr int64_t kRowsOfAPass = 32;  // about as many cost as much as another pass

/// How many positions of `keys` a prompt can start from: none that the prober reads.
inline int64_t shared_with(const std::vector<Key>& keys, const EncodedPrompt& prompt) {
  const int64_t most = std::min(prompt.probed.back().front(), static_cast<int64_t>(keys.size()));
  return std::mismatch(keys.begin(), keys.begin() + most, prompt.keys.begin()).first - keys.begin();
}

/// The numbers of those prompts, from `first` on, for which a pass has room behind what all of them share with what has
/// `begun`.
inline std::vector<size_t> can_share_a_pass(const std::vector<EncodedPrompt>& prompts, size_t first,
                                            const CachedPrefix& begun) {
  const auto rows = [&](size_t i, int64_t shared) { return static_cast<int64_t>(prompts[i].keys.size()) - shared; };
  std::vector<size_t> fitting, found;
  int64_t shared = std::numeric_limits<int64_t>::max();
  for (size_t i = first; i < prompts.size(); ++i) {
    if (!is_probed(prompts[i].probed)) continue;
    const int64_t own = shared_with(begun.keys, prompts[i]);
    if (rows(i, own) > kPrefillChunk) continue;
    fitting.push_back(i);
    shared = std::min(shared, own);
  }
  for (const size_t i : fitting) {
    if (rows(i, shared) <= kPrefillChunk) found.push_back(i);
  }
  return found;
}

/// Whether the first of several prompts has a pass of its own, and the others start from its caches: if they have so
/// much more in common with it (a picture, say) than with what has `begun` that it saves more than a pass costs.
inline bool first_is_read_alone(const std::vector<EncodedPrompt>& prompts, const CachedPrefix& begun) {
  const auto is_readable = [](const EncodedPrompt& prompt) { return is_probed(prompt.probed); };
  if (!std::all_of(prompts.begin(), prompts.end(), is_readable)) return true;
  int64_t known = shared_with(begun.keys, prompts[0]), alike = std::numeric_limits<int64_t>::max();
  for (size_t i = 1; i < prompts.size(); ++i) {
    known = std::min(known, shared_with(begun.keys, prompts[i]));
    alike = std::min(alike, shared_with(prompts[0].keys, prompts[i]));
  }
  return (alike - known) * static_cast<int64_t>(prompts.size() - 1) > kRowsOfAPass;
}

/// What decoder_lower makes in one pass of what each prompt has behind the first `shared` positions, which `cache` has:
/// (1, rows of all, D). Without `hide` a prompt sees those before it.
inline Tensor<float> run_pack(const Manifest& manifest, const Graphs& graphs, KVCache& cache,
                              const std::vector<const EncodedPrompt*>& prompts, int64_t shared, bool hide = true) {
  const int64_t width = manifest.dims.hidden_size;
  std::vector<Position> positions(prompts[0]->positions.begin(), prompts[0]->positions.begin() + shared);
  Rows embeds{width, {}};
  for (const EncodedPrompt* prompt : prompts) {
    positions.insert(positions.end(), prompt->positions.begin() + shared, prompt->positions.end());
    embeds.append(prompt->inputs_embeds.row(shared), prompt->inputs_embeds.count() - shared);
  }
  const int64_t rows = embeds.count(), total = shared + rows;
  cache.reserve(total, shared, manifest.dims.context_length);
  RotaryTables tables(manifest.rotary, std::move(positions), total, shared);
  tables.extend(total);
  Tensor<float> bias({1, 1, rows, total}), hidden({1, rows, width});
  if (hide) std::fill(bias.data(), bias.data() + bias.size(), std::numeric_limits<float>::lowest());
  int64_t row = 0;
  for (const EncodedPrompt* prompt : prompts) {
    const int64_t first = shared + row, end = first + static_cast<int64_t>(prompt->keys.size()) - shared;
    for (; row < end - shared; ++row) {
      float* added = bias.data() + row * total;
      std::fill(added, added + shared, 0.0F);
      std::fill(added + first, added + end, 0.0F);
    }
  }
  const Ort::Value input = Tensor<float>::view(embeds.row(0), {1, rows, width});
  const Tensor<int32_t> seqlens_k({1}, {static_cast<int32_t>(total - 1)}), all({}, {static_cast<int32_t>(total)});
  Call::Bound inputs = cache.past, outputs = cache.present;
  inputs.insert(inputs.end(), {{"inputs_embeds", &input},
                               {"seqlens_k", &seqlens_k.value()},
                               {"total_sequence_length", &all.value()},
                               {kAttentionBias, &bias.value()}});
  const auto rotary = tables.inputs();
  inputs.insert(inputs.end(), rotary.begin(), rotary.end());
  outputs.emplace_back("hidden_states", &hidden.value());
  Call(graphs.at(manifest.prefill_graph("decoder_lower")), inputs, outputs)();
  return hidden;
}

/// p_unsafe of the last turn of each prompt, NaN if the prober failed. `begun`: what they start from, and what further
/// readings can start from. Its caches are overwritten behind what all share, unless they are lent: then copied.
inline std::vector<double> read_packed(const Manifest& manifest, const Graphs& graphs, const Log& log,
                                       CachedPrefix& begun, const std::vector<const EncodedPrompt*>& prompts) {
  int64_t shared = std::numeric_limits<int64_t>::max();
  for (const EncodedPrompt* prompt : prompts) shared = std::min(shared, shared_with(begun.keys, *prompt));
  if (begun.lent) {
    const int64_t room = std::min(shared + 2 * kPrefillChunk, manifest.dims.context_length);
    begun.lower = begun.lower.copy(shared, room);
    begun.upper = KVCache(manifest.graphs.at("decoder_upper"), manifest, room);
    begun.lent = false;
  }
  begun.keys.resize(static_cast<size_t>(shared));
  begun.pending.clear();
  std::vector<double> found;
  for (size_t first = 0; first < prompts.size();) {
    std::vector<const EncodedPrompt*> pack;
    for (int64_t room = kPrefillChunk; first < prompts.size(); ++first) {
      room -= static_cast<int64_t>(prompts[first]->keys.size()) - shared;
      if (room < 0 && !pack.empty()) break;
      pack.push_back(prompts[first]);
    }
    const Tensor<float> hidden = run_pack(manifest, graphs, begun.lower, pack, shared);
    const float* own = hidden.data();
    for (const EncodedPrompt* prompt : pack) {
      const int64_t width = manifest.dims.hidden_size;
      const float* end = own + (static_cast<int64_t>(prompt->keys.size()) - shared) * width;
      std::vector<const float*> read;
      for (const int64_t position : prompt->probed.back()) read.push_back(own + (position - shared) * width);
      const bool finite = std::all_of(own, end, [](float x) { return std::isfinite(x); });
      // a row that is not finite makes all rows of its pass so
      if (!finite && log) log("a pass gave hidden states that are not finite, so what it read counts as unsafe");
      found.push_back(finite ? probe(graphs.at("prober"), log, mean_of_rows(read, width)) : std::nan(""));
      own = end;
    }
  }
  return found;
}

}  // namespace autosteer
