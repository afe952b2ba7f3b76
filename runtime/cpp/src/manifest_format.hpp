// What autosteer.json says: the structs are the dataclasses of runtime/manifest_format.py; docs/embedding.md explains
// every field.
//
// split_layer = k: decoder_lower runs layers 0..k-1, the prober reads what enters layer k, decoder_upper runs k..N-1.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace autosteer {

/// An input of decoder_lower, if several texts may share a pass (packed.hpp).
constexpr const char* kAttentionBias = "attention_bias";

namespace fs = std::filesystem;

// Tables are in functions, or constexpr: a static object of a host may open an engine before others are constructed.

/// A package has both or neither.
inline const std::map<std::string, std::string>& prefill_graphs() {
  static const std::map<std::string, std::string> graphs = {{"decoder_lower", "prefill_lower"},
                                                            {"decoder_upper", "prefill_upper"}};
  return graphs;
}

/// Every graph that a package may have.
inline const std::set<std::string>& known_graphs() {
  static const std::set<std::string> graphs = {"embed_tokens",  "decoder_lower", "decoder_upper",  "lm_head",
                                               "prober",        "refusal_head",  "vision_encoder", "image_tokenizer",
                                               "prefill_lower", "prefill_upper", "monitor"};
  return graphs;
}

/// Exactly one, if the model takes images; and the output that it gives for each tile.
inline const std::map<std::string, std::string>& image_graphs() {
  static const std::map<std::string, std::string> graphs = {{"vision_encoder", "image_features"},
                                                            {"image_tokenizer", "input_ids"}};
  return graphs;
}

struct Dims {
  int64_t hidden_size, num_hidden_layers, num_key_value_heads, head_dim, vocab_size;
  int64_t context_length;  ///< most tokens of a prompt and its answer together
};

using Dimension = std::variant<int64_t, std::string>;  ///< a size, or the name of a symbolic one

struct TensorSpec {
  std::string name, dtype;  ///< dtype: numpy's name
  std::vector<Dimension> shape;

  bool operator==(const TensorSpec& other) const {
    return name == other.name && dtype == other.dtype && shape == other.shape;
  }
};

struct GraphSpec {
  std::string file, sha256;
  std::vector<TensorSpec> inputs, outputs;
  std::optional<std::array<int64_t, 2>> layers;  ///< decoder halves: first layer, one past the last
  std::string precision;                         ///< fp32, fp16, int8 or int4
};

struct DataFile {
  std::string file, sha256;
  int64_t bytes;
};

/// Other frequencies of long prompts. They turn all positions, so an answer to a shorter prompt ends where they would
/// begin.
struct LongRotary {
  int64_t beyond;                   ///< positions; longer prompts have these frequencies
  std::vector<double> frequencies;  ///< as RotarySpec's
};

/// Rotary position embedding: cos and sin of position * frequency, both times `scale` (see rotary.hpp).
struct RotarySpec {
  /// Radians a position: one for each pair of a head's numbers that is rotated, at most head_dim / 2.
  std::vector<double> frequencies;
  double scale;
  /// By frequency: which of a row's three positions it reads: 0 time, 1 row, 2 column. Empty: a row has one position,
  /// its index in the sequence, in text and pictures alike.
  std::vector<int64_t> axes;
  std::optional<LongRotary> longer;  ///< "long" in the manifest
  std::vector<double> windowed;      ///< other frequencies, as many, of layers with a window; empty: the same

  /// Whether a prompt of `length` has the other frequencies.
  bool is_long(int64_t length) const { return longer && length > longer->beyond; }

  /// The frequencies of each pair of tables that the graphs read, for a prompt of `length`: "" for `cos_cache` and
  /// `sin_cache`, and "windowed_" for `windowed_cos_cache` and `windowed_sin_cache`, if layers with a window read
  /// others.
  std::vector<std::pair<std::string, const std::vector<double>*>> by_table(int64_t length) const {
    std::vector<std::pair<std::string, const std::vector<double>*>> tables;
    tables.emplace_back("", is_long(length) ? &longer->frequencies : &frequencies);
    if (!windowed.empty()) tables.emplace_back("windowed_", &windowed);
    return tables;
  }

  /// Most tokens of an answer to a prompt of `length`: the last one has no position yet.
  int64_t longest_answer(int64_t length, int64_t context) const {
    const int64_t most = context - length;
    return !longer || is_long(length) ? most : std::min(most, longer->beyond + 1 - length);
  }
};

/// How image kind "anyres" cuts one image into tiles and lays their features out among the tokens.
struct AnyresSpec {
  int64_t tokens_per_side;                             ///< image_features of one tile: tokens_per_side ** 2 rows
  std::vector<std::array<int64_t, 2>> grid_pinpoints;  ///< (height, width) in pixels
  int64_t max_tiles_side;                              ///< larger feature grids are shrunk to about this many tiles
  bool each = false;  ///< each of several pictures is cut like one alone; false: each becomes one square tile
};

/// How image kind "split" cuts an image into tiles, and adds the whole image as one more.
struct SplitSpec {
  int64_t longest_edge;  ///< pixels; every picture is scaled to it first
  bool tiles;            ///< false: only the whole image
};

/// How image kind "closest_grid" cuts an image into tiles: the whole image is one more, unless there is one tile.
struct ClosestGridSpec {
  int64_t min_tiles, max_tiles;  ///< without the whole image
};

/// How image kind "native" scales a picture: to whole tiles, at about its own size. The graph cuts it, and makes one
/// row of each tile.
struct NativeSpec {
  int64_t min_pixels, max_pixels;  ///< smaller pictures are enlarged, larger ones shrunk
  int64_t frames;                  ///< pictures that the graph reads as one; a picture is given as often
  int64_t deepstack = 0;  ///< first decoder layers to whose output a row adds a further part: see deepstack.hpp
};

/// The token ids around and between the tiles of an image that was cut into `grid` (rows, columns).
struct TileSeparators {
  std::array<int64_t, 2> grid;
  std::vector<std::vector<int64_t>> token_ids;  ///< [i]: before the rows of tile i; the last: after all tiles
};

/// How an RGB image becomes pixel_values. `vision_encoder` turns them into rows, `image_tokenizer` into token ids.
struct ImageSpec {
  std::string kind;  ///< anyres, centre_crop, closest_grid, native, pad_to_square or split
  /// Pixels. The image graph's input is (tiles, 3, tile_size, tile_size); for "native" (frames, 3, height, width), with
  /// sides that are multiples of it.
  int64_t tile_size;
  std::array<double, 3> mean, std;
  double rescale_factor;
  std::string resample;  ///< nearest, lanczos, bilinear or bicubic: Pillow's
  std::optional<AnyresSpec> anyres;
  std::optional<SplitSpec> split;
  std::optional<NativeSpec> native;
  std::vector<TileSeparators> tile_separators;  ///< one for each grid; empty: no separators
  std::optional<ClosestGridSpec> closest_grid;
};

/// How the frames of a video are scaled, all alike, where pictures are "native"; and how its rows stand in time.
struct NativeVideoSpec {
  int64_t min_pixels, max_pixels;  ///< smaller frames are enlarged, larger ones shrunk
  bool whole;                      ///< the two bound the pixels of all frames together; false: those of each
  double tokens_per_second;        ///< positions of the time axis; 0: one for each group of frames
};

/// How a video's frames become pixel_values, and the vision_encoder's features become rows (see video.hpp).
struct VideoSpec {
  std::array<double, 3> mean, std;
  double rescale_factor;
  /// If pictures are "anyres": tokens_per_side ** 2 rows of a frame are pooled to pooled_side ** 2.
  std::optional<int64_t> pooled_side;
  std::optional<NativeVideoSpec> native;  ///< if they are "native"
};

/// One piece of the chat template (see text.hpp).
struct TemplatePiece {
  std::string kind;  ///< token, literal, text, image, video or seconds
  std::string text;
  int64_t id = -1;
};

struct TurnSpec {
  std::vector<TemplatePiece> prefix, image, text, suffix;
  std::vector<TemplatePiece> lead;  ///< after the prefix, if the turn's first part is a text
  std::vector<TemplatePiece> video;
};

/// What is written for each group of a video's frames that the image graph reads as one.
struct FrameGroup {
  int64_t frames;  ///< of a group; the last one is filled up with the last frame
  /// `video` stands for the group's rows, `seconds` for the mean of its ends' times.
  std::vector<TemplatePiece> pieces;
};

struct PromptSpec {
  std::vector<TemplatePiece> begin;  ///< opens a dialogue without a system turn
  std::optional<TurnSpec> system;
  TurnSpec user, assistant;
  std::vector<TemplatePiece> generation;  ///< opens the answer
  bool images_first;                      ///< reorder a turn's parts: images, videos, texts
  bool strip_text;                        ///< strip white space around a turn's text
  std::vector<int64_t> end_token_ids;
  std::string tokenizer = "tokenizer.json";
  std::optional<FrameGroup> frame_group;  ///< in the place of a turn's `video`; none: a video's rows are one run
};

struct ProberSpec {
  int64_t token_offset;  ///< position of hidden_states that it reads, from the end of the prompt
  std::string pooling;   ///< "last": that position; "mean": over it and all text positions of the turn before it
  double threshold;      ///< safe = 0 <= p_unsafe <= threshold
  bool judge_answers;    ///< whether requests that do not say it have their answers judged (gate.hpp)
  std::optional<double> judge_threshold;  ///< an answer that is judged is unsafe above it, too; at most the threshold
};

/// When the graph `monitor`, which has the prober's shape, stops an answer (see monitor.hpp).
struct MonitorSpec {
  int64_t window;    ///< tokens whose mean hidden state it reads
  double threshold;  ///< an answer goes on while 0 <= p_unsafe <= threshold
};

/// N-grams of the model's own answers, from which free text is drafted (see draft_table.hpp).
struct DraftSpec {
  std::string file;
  int64_t ngrams;
};

struct RefusalSpec {
  double strength;
  std::string text;  ///< the answer to an unsafe prompt under --policy stop
};

struct Golden {
  std::string prompt;
  std::vector<std::string> images;
  std::optional<double> threshold, p_unsafe;
  std::string action;              ///< pass or steer
  std::vector<int64_t> token_ids;  ///< of the answer; if the action is steer, the unsteered answer differs
  std::vector<std::vector<std::string>> videos;  ///< the frames of each
  std::vector<int64_t> prompt_ids;               ///< token ids of the rendered prompt, instead of `prompt`
  std::vector<std::vector<double>> seconds;      ///< when each frame of each is shown; empty: nothing says so
};

/// How far results on another machine may differ from the golden ones.
struct Tolerance {
  double p_unsafe;  ///< largest difference
  int64_t answers;  ///< how many golden answers may differ
};

/// lm_head's output for one hidden state, unsteered, and steered at the package's strength.
struct SteeredState {
  int64_t token, steered_token;  ///< the most likely; the most likely after steering, always another one
  double shift;                  ///< root mean square over the vocabulary of what steering adds to the logits
};

/// Hidden states and the gate's outputs for them. `file` holds little-endian float32 vectors of hidden_size: what the
/// prober read of a prompt, one for each of `p_unsafe`; the last hidden state of a prompt, one for each of `steered`;
/// and the same after the Refusal Head.
struct GateProof {
  std::string file;
  std::vector<double> p_unsafe;
  std::vector<SteeredState> steered;
  std::vector<double> monitor;  ///< its output for the states of `p_unsafe`, if there is a monitor
};

struct Manifest {
  bool guarded;
  int split_layer;
  Dims dims;
  std::string cache_type;  ///< numpy's name for the type of the caches: float32 or int8
  RotarySpec rotary;
  std::map<std::string, GraphSpec> graphs;
  std::vector<DataFile> files;
  PromptSpec prompt;
  std::optional<ImageSpec> image;
  std::optional<VideoSpec> video;
  std::optional<ProberSpec> prober;
  std::optional<RefusalSpec> refusal;
  std::optional<MonitorSpec> monitor;  ///< absent: nothing watches answers
  std::optional<DraftSpec> drafts;     ///< absent: only what an answer copies is drafted
  std::vector<Golden> golden;
  Tolerance tolerance;
  std::optional<GateProof> proof;  ///< if guarded
  std::string onnxruntime;         ///< the oldest version that computes this package correctly, for example "1.23"
  std::string precision;           ///< of the weights: fp32, fp16, int8 or int4
  std::string pillow = "unknown";  ///< the version of Pillow that resized the golden pictures

  /// Whether all machines give the same tokens: no int8 or int4 weights or caches.
  bool exact() const {
    const auto is_exact = [](const std::string& p) { return p == "fp32" || p == "fp16"; };
    return cache_type == "float32" && is_exact(precision) &&
           std::all_of(graphs.begin(), graphs.end(), [&](const auto& g) { return is_exact(g.second.precision); });
  }

  /// Read and check autosteer.json of `folder`; files are checked by `verify`.
  static Manifest load(const fs::path& folder);

  /// How many decoder layers, the first ones, have an input that is added to their output.
  int64_t deepstack() const { return image && image->native ? image->native->deepstack : 0; }

  /// Whether decoder_lower can run over several texts in one pass (packed.hpp).
  bool reads_in_packs() const {
    const auto& inputs = graphs.at("decoder_lower").inputs;
    return std::any_of(inputs.begin(), inputs.end(), [](const auto& input) { return input.name == kAttentionBias; });
  }

  /// The graph that runs prefill for a decoder half: its copy at another precision, or else the half itself.
  std::string prefill_graph(const std::string& half) const {
    const std::string& copy = prefill_graphs().at(half);
    return graphs.count(copy) > 0 ? copy : half;
  }

  /// sha256 of every file of the package, by relative path.
  std::map<std::string, std::string> paths() const {
    const auto all = hashes();
    return {all.begin(), all.end()};
  }

  /// (path, sha256) of every entry; a file may have several.
  std::vector<std::pair<std::string, std::string>> hashes() const {
    std::vector<std::pair<std::string, std::string>> all;
    for (const auto& [name, spec] : graphs) all.emplace_back(spec.file, spec.sha256);
    for (const auto& spec : files) all.emplace_back(spec.file, spec.sha256);
    return all;
  }

  /// Compare every file with its hash. Throws PackageError naming the first that is missing or differs.
  void verify(const fs::path& folder) const;
};

}  // namespace autosteer
