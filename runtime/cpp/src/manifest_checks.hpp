// Whether a manifest is consistent: graphs and their tensors, files, the gate, golden prompts, the template. The C++
// side of runtime/manifest_checks.py. Sizes are checked as they are decoded (Node::as_size).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "draft_table.hpp"
#include "errors.hpp"
#include "manifest_format.hpp"
#include "unicode.hpp"

namespace autosteer {

constexpr int64_t kMostSide = 1 << 12;     // rows of features on a side of a tile
constexpr int64_t kMostLayers = 1 << 10;
constexpr int64_t kLargestWindow = 1 << 8;      // tokens of an answer that are held back
constexpr double kMaxPUnsafeTolerance = 0.05;  // scores that differ more are not the measured gate's

namespace decoding {

inline bool leaves_package(const std::string& file) {
  const fs::path path(file);
  const bool climbs = std::find(path.begin(), path.end(), fs::path("..")) != path.end();
  return file.empty() || path.is_absolute() || climbs ||
         file.find_first_of(std::string("\\\0", 2)) != std::string::npos;
}

constexpr int64_t kAnySize = -1;  // in the shape of an expected tensor

/// The inputs that the loop binds, and the outputs that it reads. A graph has no others.
struct Tensors {
  std::vector<TensorSpec> inputs, outputs;
};

/// The tensors of the image graph. How many rows or ids it gives for a tile is its own affair.
inline Tensors expected_of_images(const Manifest& m, const std::string& name) {
  const ImageSpec& image = m.image.value();
  std::vector<Dimension> pixels = {"tiles", 3, image.tile_size, image.tile_size};
  if (image.native) pixels = {image.native->frames, 3, "height", "width"};
  Tensors tensors{{{"pixel_values", "float32", pixels}}, {}};
  if (name == "image_tokenizer") {
    tensors.outputs = {{"input_ids", "int64", {kAnySize, kAnySize}}};
  } else {
    const int64_t width = (1 + m.deepstack()) * m.dims.hidden_size;
    tensors.outputs = {{"image_features", "float32", {kAnySize, kAnySize, width}}};
    if (image.anyres) tensors.outputs.push_back({"image_newline", "float32", {m.dims.hidden_size}});
  }
  return tensors;
}

/// The tensors of each graph.
inline std::map<std::string, Tensors> expected_tensors(const Manifest& m) {
  const Dims& d = m.dims;
  const std::string batch = "batch", n = "sequence_length", f32 = "float32";
  const std::vector<Dimension> rows = {1, n, d.hidden_size}, last = {1, "num_logits", d.hidden_size};
  const auto half = [&](const char* name, const char* source, const char* target, const Dimension& made) {
    const std::vector<Dimension> table = {"rotary_length", static_cast<int64_t>(m.rotary.frequencies.size())};
    Tensors tensors{{{source, f32, {batch, n, d.hidden_size}},
                     {"seqlens_k", "int32", {batch}},
                     {"total_sequence_length", "int32", {}}},
                    {{target, f32, {batch, made, d.hidden_size}}}};
    for (const auto& [kind, frequencies] : m.rotary.by_table(0)) {
      for (const char* part : {"cos_cache", "sin_cache"}) tensors.inputs.push_back({kind + part, f32, table});
    }
    if (name == std::string("decoder_lower") && m.reads_in_packs()) {
      tensors.inputs.push_back({kAttentionBias, f32, {1, 1, n, "total_sequence_length"}});
    }
    const auto [first, end] = m.graphs.at(name).layers.value();
    for (int64_t layer = first; layer < end; ++layer) {
      if (layer < m.deepstack()) {
        tensors.inputs.push_back({"deepstack." + std::to_string(layer), f32, {1, "deepstack_length", d.hidden_size}});
      }
      for (const char* kind : {"key", "value"}) {
        const std::string suffix = "." + std::to_string(layer) + "." + kind;
        const auto cache = [&](const char* side, const char* length) -> TensorSpec {
          return {side + suffix, m.cache_type, {batch, d.num_key_value_heads, length, d.head_dim}};
        };
        tensors.inputs.push_back(cache("past_key_values", "past_sequence_length"));
        tensors.outputs.push_back(cache("present", "total_sequence_length"));
      }
    }
    return tensors;
  };
  std::map<std::string, Tensors> expected = {
      {"embed_tokens", {{{"input_ids", "int64", {1, n}}}, {{"inputs_embeds", f32, rows}}}},
      {"decoder_lower", half("decoder_lower", "inputs_embeds", "hidden_states", n)},
      {"decoder_upper", half("decoder_upper", "hidden_states", "last_hidden_state", "num_logits")},
      {"lm_head", {{{"last_hidden_state", f32, last}}, {{"logits", f32, {1, "num_logits", d.vocab_size}}}}}};
  expected["decoder_upper"].inputs.push_back({"num_logits", "int64", {1}});
  for (const auto& [name, copy] : prefill_graphs()) expected[m.prefill_graph(name)] = expected.at(name);
  if (m.guarded) {
    expected["prober"] = {{{"hidden_states", f32, {1, d.hidden_size}}}, {{"p_unsafe", f32, {1}}}};
    expected["refusal_head"] = {{{"last_hidden_state", f32, last}, {"strength", f32, {1}}},
                                {{"steered_hidden_state", f32, last}}};
  }
  if (m.monitor) expected["monitor"] = expected["prober"];
  for (const auto& [name, output] : image_graphs()) {
    if (m.graphs.count(name)) expected[name] = expected_of_images(m, name);
  }
  return expected;
}

/// The turns of all roles that the model has.
inline std::vector<const TurnSpec*> turns(const PromptSpec& prompt) {
  std::vector<const TurnSpec*> turns = {&prompt.user, &prompt.assistant};
  if (prompt.system) turns.push_back(&*prompt.system);
  return turns;
}

/// Every piece that is not inside a part of a turn.
inline std::vector<TemplatePiece> outside(const PromptSpec& prompt) {
  std::vector<TemplatePiece> all = prompt.begin;
  const auto add = [&](const std::vector<TemplatePiece>& more) { all.insert(all.end(), more.begin(), more.end()); };
  for (const TurnSpec* turn : turns(prompt)) {
    for (const auto* part : {&turn->prefix, &turn->lead, &turn->suffix}) add(*part);
  }
  add(prompt.generation);
  return all;
}

/// Whether `text` is "major.minor", for example "1.23".
inline bool is_version(const std::string& text) {
  const size_t dot = text.find('.');
  const auto is_number = [](const std::string& part) {
    return !part.empty() && part.size() <= 4 && part.find_first_not_of("0123456789") == std::string::npos;
  };
  return dot != std::string::npos && is_number(text.substr(0, dot)) && is_number(text.substr(dot + 1));
}

/// (kind, pieces) of every part that a turn can have. Turns that take no images or videos have none of them.
inline std::vector<std::pair<std::string, std::vector<TemplatePiece>>> inside(const PromptSpec& prompt) {
  std::vector<std::pair<std::string, std::vector<TemplatePiece>>> parts;
  for (const TurnSpec* turn : turns(prompt)) {
    if (!turn->image.empty()) parts.emplace_back("image", turn->image);
    if (!turn->video.empty()) parts.emplace_back("video", turn->video);
    parts.emplace_back("text", turn->text);
  }
  return parts;
}

/// Every piece of the template.
inline std::vector<TemplatePiece> pieces(const PromptSpec& prompt) {
  std::vector<TemplatePiece> all = outside(prompt);
  for (const auto& [kind, part] : inside(prompt)) all.insert(all.end(), part.begin(), part.end());
  if (prompt.frame_group) all.insert(all.end(), prompt.frame_group->pieces.begin(), prompt.frame_group->pieces.end());
  return all;
}

using Need = std::function<void(bool condition, const std::string& what)>;

inline bool in_vocabulary(const Manifest& m, const std::vector<int64_t>& ids) {
  return std::all_of(ids.begin(), ids.end(), [&](int64_t id) { return 0 <= id && id < m.dims.vocab_size; });
}

/// Whether a tensor has the expected type and shape.
inline bool fits(const TensorSpec& found, const TensorSpec& expected) {
  const auto is_size = [](const Dimension& size, const Dimension& wanted) {
    return wanted == Dimension(kAnySize) || size == wanted;
  };
  return found.dtype == expected.dtype &&
         std::equal(found.shape.begin(), found.shape.end(), expected.shape.begin(), expected.shape.end(), is_size);
}

/// Check that the inputs or the outputs of a graph are the expected ones, in any order.
inline void check_tensors(const std::vector<TensorSpec>& expected, const std::vector<TensorSpec>& found,
                          const std::string& graph, const Need& need) {
  const auto named = [](const std::vector<TensorSpec>& tensors, const std::string& name) {
    return std::find_if(tensors.begin(), tensors.end(), [&](const TensorSpec& t) { return t.name == name; });
  };
  for (const TensorSpec& tensor : expected) {
    const auto known = named(found, tensor.name);
    need(known != found.end(), graph + " has no '" + tensor.name + "'");
    need(fits(*known, tensor), graph + ": '" + tensor.name + "' is not of the shape and type that 'dims' says");
  }
  for (const TensorSpec& tensor : found) {
    need(named(expected, tensor.name) != expected.end(), graph + ": this runtime has no use for '" + tensor.name + "'");
  }
  need(found.size() == expected.size(), graph + " has two tensors of one name");
}

/// The graphs that this runtime runs, and no others; each half has its layers.
inline void check_graphs(const Manifest& m, const Need& need) {
  std::vector<std::string> graphs = {"embed_tokens", "decoder_lower", "decoder_upper", "lm_head"};
  if (m.guarded) graphs.insert(graphs.end(), {"prober", "refusal_head"});
  for (const auto& name : graphs) {
    need(m.graphs.count(name) > 0, "graph '" + name + "' is missing; the package cannot run without it");
  }
  for (const auto& [name, graph] : m.graphs) {
    need(known_graphs().count(name) > 0,
         "this runtime has no use for graph '" + name + "'; without it answers might not be the package's");
  }
  need(m.graphs.count("vision_encoder") + m.graphs.count("image_tokenizer") == (m.image ? 1 : 0),
       "'image' comes with one graph of vision_encoder, image_tokenizer");
  if (m.image && m.image->anyres) {
    need(m.image->anyres->tokens_per_side <= kMostSide,
         "image: tokens_per_side is above " + std::to_string(kMostSide));
  }
  const int64_t k = m.split_layer, n = m.dims.num_hidden_layers;
  using Layers = std::array<int64_t, 2>;
  need(n <= kMostLayers, "dims: num_hidden_layers " + std::to_string(n) + " is above " + std::to_string(kMostLayers));
  need(0 < k && k < n, "split_layer " + std::to_string(k) + " is not between 1 and " + std::to_string(n - 1));
  need(!m.reads_in_packs() || (m.rotary.windowed.empty() && !m.rotary.longer && m.deepstack() == 0),
       "attention_bias goes with no windowed or long frequencies, no deepstack");
  need(m.graphs.count("prefill_lower") == m.graphs.count("prefill_upper"),
       "of prefill_lower and prefill_upper there are both or neither");
  for (const auto& [half, layers] : {std::pair{"decoder_lower", Layers{0, k}}, {"decoder_upper", Layers{k, n}}}) {
    for (const std::string& name : {std::string(half), m.prefill_graph(half)}) {
      need(m.graphs.at(name).layers == layers,
           name + " must hold layers " + std::to_string(layers[0]) + " to " + std::to_string(layers[1] - 1));
    }
  }
}

/// A frequency for each pair of a head's numbers; each reads a position that there is.
inline void check_rotary(const Manifest& m, const Need& need) {
  const auto& [frequencies, scale, axes, longer, windowed] = m.rotary;
  const size_t count = frequencies.size();
  const std::string wanted = ", not " + std::to_string(count);
  need(0 < count && 2 * static_cast<int64_t>(count) <= m.dims.head_dim,
       "rotary: " + std::to_string(count) + " frequencies, and head_dim is " + std::to_string(m.dims.head_dim));
  need(axes.empty() || axes.size() == count,
       "rotary: " + std::to_string(axes.size()) + " axes, not one for each frequency");
  need(windowed.empty() || windowed.size() == count,
       "rotary: " + std::to_string(windowed.size()) + " windowed frequencies" + wanted);
  const auto is_axis = [](int64_t axis) { return 0 <= axis && axis <= 2; };
  need(std::all_of(axes.begin(), axes.end(), is_axis), "rotary: an axis is not 0, 1 or 2");
  if (longer) {
    need(longer->frequencies.size() == count,
         "rotary: " + std::to_string(longer->frequencies.size()) + " long frequencies" + wanted);
    need(windowed.empty(), "rotary: long and windowed frequencies do not go together");
  }
}

/// The token ids around tiles. How pictures are cut is checked where it is decoded (`image`).
inline void check_image(const Manifest& m, const Need& need) {
  const auto is_colour = [](double mean) { return 0.0 <= mean && mean <= 1.0; };
  need(!m.image || std::all_of(m.image->mean.begin(), m.image->mean.end(), is_colour),
       "image: a mean is not from 0 to 1");
  need(!m.image || !m.image->native || m.graphs.count("vision_encoder"),
       "image: 'native' pictures come with a vision_encoder");
  need(0 <= m.deepstack() && m.deepstack() < m.dims.num_hidden_layers, "image: deepstack has too many layers");
  std::set<std::array<int64_t, 2>> grids;
  for (const TileSeparators& separators : m.image ? m.image->tile_separators : std::vector<TileSeparators>()) {
    need(grids.insert(separators.grid).second, "image: two tile_separators for one grid");
    for (const auto& ids : separators.token_ids) {
      need(in_vocabulary(m, ids), "image: tile_separators have an id outside the vocabulary");
    }
  }
}

/// How videos are scaled, and pooled.
inline void check_video(const Manifest& m, const Need& need) {
  const auto all = pieces(m.prompt);
  const bool written = std::any_of(all.begin(), all.end(), [](const auto& piece) { return piece.kind == "video"; });
  need(m.video.has_value() == written, "'video' and the prompt's pieces of that kind come together");
  if (m.video) {
    const VideoSpec& video = *m.video;
    need(m.image && (m.image->anyres || m.image->native) && m.graphs.count("vision_encoder"),
         "'video' comes with 'anyres' or 'native' images and a vision_encoder");
    const ImageSpec& image = *m.image;
    need(video.native.has_value() == image.native.has_value(), "video: 'native' comes with 'native' images");
    need(video.pooled_side.has_value() == image.anyres.has_value(), "video: 'pooled_side' comes with 'anyres'");
    need(!image.anyres || *video.pooled_side <= image.anyres->tokens_per_side,
         "video: pooled_side is above tokens_per_side");
    need(!video.native || image.tile_size * image.tile_size <= video.native->max_pixels,
         "video: a tile has more than max_pixels");
  }
  const int64_t frames = m.video && m.image->native ? m.image->native->frames : 0;
  need(!m.prompt.frame_group || m.prompt.frame_group->frames == frames,
       "prompt: frame_group has not the frames that the image graph reads as one");
}

/// Prober, Refusal Head and monitor.
inline void check_gate(const Manifest& m, const Need& need) {
  need(m.guarded == m.prober.has_value() && m.guarded == m.refusal.has_value(),
       "'guarded', 'prober' and 'refusal' contradict each other");
  if (m.prober && m.refusal) {
    need(0.0 <= m.prober->threshold && m.prober->threshold < 1.0, "prober: threshold is not from 0 to 1");
    const double judged = m.prober->judge_threshold.value_or(m.prober->threshold);
    need(0.0 <= judged && judged <= m.prober->threshold, "prober: judge_threshold is not from 0 to the threshold");
    need(m.prober->token_offset < 0, "prober: token_offset counts from the end of the prompt: below zero");
    need(m.refusal->strength > 0.0, "refusal: strength must be above zero, or nothing is steered");
    need(!strip(m.refusal->text).empty(), "refusal: text is empty");
  }
  need(m.monitor.has_value() == (m.graphs.count("monitor") > 0), "'monitor' and its graph come together");
  if (m.monitor) {
    need(m.guarded, "a monitor comes with a gate");
    need(m.monitor->window <= kLargestWindow, "monitor: window is too large");
    need(0.0 <= m.monitor->threshold && m.monitor->threshold < 1.0, "monitor: threshold is not from 0 to 1");
  }
}

/// `file`, which `where` names, is in 'files' with so many bytes.
inline void need_bytes(const Manifest& m, const std::string& where, const std::string& file, int64_t bytes,
                       const Need& need) {
  const auto described =
      std::find_if(m.files.begin(), m.files.end(), [&](const DataFile& one) { return one.file == file; });
  need(described != m.files.end() && described->bytes == bytes,
       where + ": '" + file + "' must be in 'files' with " + std::to_string(bytes) + " bytes");
}

/// The states that prove the gate on another machine.
inline void check_proof(const Manifest& m, const Need& need) {
  need(m.guarded == m.proof.has_value(), "'guarded' and 'proof' contradict each other");
  if (!m.proof) return;
  const auto is_p = [](double p) { return 0.0 <= p && p <= 1.0; };
  need(!m.proof->p_unsafe.empty(), "proof: no hidden state for the prober");
  for (const auto* scores : {&m.proof->p_unsafe, &m.proof->monitor}) {
    need(std::all_of(scores->begin(), scores->end(), is_p), "proof: a p_unsafe is not from 0 to 1");
  }
  need(m.proof->monitor.size() == (m.monitor ? m.proof->p_unsafe.size() : 0),
       "proof: 'monitor' has not a number for each of 'p_unsafe'");
  need(!m.proof->steered.empty(), "proof: no hidden state for the Refusal Head");
  for (const SteeredState& state : m.proof->steered) {
    need(in_vocabulary(m, {state.token, state.steered_token}), "proof: an id outside the vocabulary");
    need(state.token != state.steered_token, "proof: a state whose token steering leaves as it was proves nothing");
    need(state.shift > 0.0, "proof: a shift is not above zero");
  }
  const auto states = static_cast<int64_t>(m.proof->p_unsafe.size() + 2 * m.proof->steered.size());
  need_bytes(m, "proof", m.proof->file, 4 * m.dims.hidden_size * states, need);
}

/// The table of n-grams has as many as it says.
inline void check_drafts(const Manifest& m, const Need& need) {
  if (m.drafts) need_bytes(m, "drafts", m.drafts->file, DraftTable::kEntryBytes * m.drafts->ngrams, need);
}

/// Every file is inside the package, and has one hash.
inline void check_files(const Manifest& m, const Need& need) {
  const auto paths = m.paths();
  for (const auto& [file, hash] : paths) need(!leaves_package(file), "path '" + file + "' leaves the package");
  for (const auto& [file, hash] : m.hashes()) need(paths.at(file) == hash, "'" + file + "' has two hashes");
  const auto need_hash = [&](const std::string& file) {
    need(paths.count(file) > 0, "'" + file + "' is used but has no hash in 'files'");
  };
  need_hash(m.prompt.tokenizer);
  for (const Golden& golden : m.golden) {
    for (const auto& file : golden.images) need_hash(file);
    for (const auto& frames : golden.videos) {
      for (const auto& file : frames) need_hash(file);
    }
  }
}

/// The golden prompts, and how far another machine may be off.
inline void check_golden(const Manifest& m, const Need& need) {
  for (const Golden& golden : m.golden) {
    need(!golden.token_ids.empty(), "golden: an answer without tokens");
    need(golden.seconds.empty() || golden.seconds.size() == golden.videos.size(),
         "golden: not the seconds of each video");
    need(golden.prompt_ids.empty() || (golden.prompt.empty() && golden.images.empty() && golden.videos.empty()),
         "golden: a prompt is given twice");
    need(in_vocabulary(m, golden.token_ids) && in_vocabulary(m, golden.prompt_ids),
         "golden: an id outside the vocabulary");
  }
  need(0.0 < m.tolerance.p_unsafe && m.tolerance.p_unsafe <= kMaxPUnsafeTolerance,
       "tolerance: p_unsafe is not above 0, up to 0.05");
  need(0 <= m.tolerance.answers && m.tolerance.answers <= static_cast<int64_t>(m.golden.size()),
       "tolerance: more answers than golden prompts");
}

/// The pieces of the chat template.
inline void check_prompt(const Manifest& m, const Need& need) {
  const auto is_slot = [](const TemplatePiece& piece) { return piece.kind != "token" && piece.kind != "literal"; };
  for (const TemplatePiece& piece : outside(m.prompt)) {
    need(!is_slot(piece), "prompt: a piece '" + piece.kind + "' stands where no part of a turn goes");
  }
  for (const auto& [kind, part] : inside(m.prompt)) {
    const auto first = std::find_if(part.begin(), part.end(), is_slot);
    need(first != part.end() && first->kind == kind && std::count_if(part.begin(), part.end(), is_slot) == 1,
         "prompt: a turn's '" + kind + "' must have one piece of that kind and no other");
  }
  if (m.prompt.frame_group) {
    std::vector<std::string> slots;
    for (const TemplatePiece& piece : m.prompt.frame_group->pieces) {
      if (is_slot(piece)) slots.push_back(piece.kind);
    }
    need(slots == std::vector<std::string>{"seconds", "video"},
         "prompt: frame_group must have one 'seconds', then one 'video'");
  }
  for (const TemplatePiece& piece : pieces(m.prompt)) {
    need(piece.kind != "token" || in_vocabulary(m, {piece.id}),
         "prompt: '" + piece.text + "' has id " + std::to_string(piece.id) + "; the vocabulary ends at " +
             std::to_string(m.dims.vocab_size - 1));
  }
}

/// Every graph has the tensors that the loop names, and no others.
inline void check_tensors(const Manifest& m, const Need& need) {
  for (const auto& [name, expected] : expected_tensors(m)) {
    const GraphSpec& graph = m.graphs.at(name);
    check_tensors(expected.inputs, graph.inputs, "graph '" + name + "'", need);
    check_tensors(expected.outputs, graph.outputs, "graph '" + name + "'", need);
  }
}

/// Throws PackageError with the first thing that contradicts another. `where`: the file, for the message.
inline void check_consistency(const Manifest& m, const std::string& where) {
  const auto need = [&](bool condition, const std::string& what) {
    if (!condition) throw PackageError(where + ": " + what);
  };
  need(is_version(m.onnxruntime), "onnxruntime: '" + m.onnxruntime + "' is not a version like '1.23'");
  check_rotary(m, need);
  check_graphs(m, need);
  check_image(m, need);
  check_video(m, need);
  check_gate(m, need);
  check_proof(m, need);
  check_drafts(m, need);
  check_files(m, need);
  check_golden(m, need);
  check_prompt(m, need);
  check_tensors(m, need);
}

}  // namespace decoding
}  // namespace autosteer
