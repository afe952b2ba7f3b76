// A dialogue, its pictures and its videos -> the decoder's input embeddings. The C++ side of runtime/prompt_encoder.py.
//
//     text    -> token ids ------------------------------------------> embed_tokens -> rows
//     picture -> tiles -> pixels -> vision_encoder ---------------------------------> rows, and token ids between them
//                                   image_tokenizer (where images are tokens) -> ids -> embed_tokens -> rows
//     video   -> frames -> pixels -> vision_encoder (pooled) ------------------------> rows; with text between groups
//                                                                                      of frames, if there is any
//
// Pictures are opened and encoded one after the other, a few tiles at a time, and only as long as the prompt fits the
// context.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "conversation.hpp"
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "generation.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "stats.hpp"
#include "subgraph.hpp"
#include "text.hpp"
#include "tokenizer.hpp"
#include "video.hpp"

namespace autosteer {

constexpr int64_t kTilesPerRun = 2;  // bounds the image graph's activations

constexpr int64_t kCharactersAToken = 16;  // more than any text has, on average; English has 4 to 5

/// Throws InputError for texts that cannot fit the context, before tokens are counted.
inline void check_characters(const Manifest& manifest, const std::vector<Message>& messages) {
  const auto begins = [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80; };
  int64_t characters = 0;
  for (const Message& message : messages) {
    for (const Part& part : message.parts) {
      if (const auto* text = std::get_if<std::string>(&part)) {
        characters += std::count_if(text->begin(), text->end(), begins);
      }
    }
  }
  const int64_t most = kCharactersAToken * manifest.dims.context_length;
  if (characters > most) {
    throw InputError("the prompt has " + std::to_string(characters) +
                     " characters; for this model's context at most " + std::to_string(most) + " are read");
  }
}

/// Throws InputError for a prompt of `length` tokens, or of at least as many, that does not fit the context.
inline void check_length(const Manifest& manifest, int64_t length, bool exact = true) {
  if (length == 0) throw InputError("the prompt is empty");
  if (length >= manifest.dims.context_length) {
    throw InputError(std::string("the prompt takes ") + (exact ? "" : "at least ") + std::to_string(length) +
                     " tokens (images included); the model's context holds " +
                     std::to_string(manifest.dims.context_length));
  }
}

/// For each turn the positions that the prober reads, ascending: the same as if the dialogue ended there. None where
/// a turn is too short, or where the text that follows changed the tokens that the prober would have read. Without a
/// prober, the last position: a conversation continues from it. `text`: the positions of token ids, but those between
/// groups of a video's frames. `sizes`: the rows of each picture, video and group, separators included. A mean leaves
/// out pictures and videos: their many rows, and times, would outweigh the text.
inline Probed probed_positions(const std::optional<ProberSpec>& prober, const std::vector<JudgedTurn>& turns,
                               const std::vector<int64_t>& text, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> before = {0};  // rows of the first n pictures and videos
  for (const int64_t size : sizes) before.push_back(before.back() + size);
  const auto row = [&](const Place& place) { return place.tokens + before.at(place.slots); };
  const int64_t offset = prober ? prober->token_offset : -1, length = row(turns.back().end);
  Probed probed;
  for (auto turn = prober ? turns.begin() : turns.end() - 1; turn != turns.end(); ++turn) {
    const int64_t last = row(turn->end) + offset;
    probed.emplace_back();
    if (last < 0 || last >= length || offset >= -turn->unlike) continue;
    if (!prober || prober->pooling == "last") {
      probed.back().push_back(last);
    } else {
      const auto first = std::lower_bound(text.begin(), text.end(), row(turn->content));
      const auto end = std::upper_bound(text.begin(), text.end(), last);
      if (first < end) probed.back().assign(first, end);
    }
  }
  return probed;
}

/// Encodes prompts for one package. Keeps no state of a dialogue.
class PromptEncoder {
 public:
  using FindGraph = std::function<std::shared_ptr<const Subgraph>(const std::string& name)>;

  /// `max_tiles`: a picture, or a frame of a video for a model that takes them in any size, is cut into so many at
  /// most. `graph`: returns a loaded graph by name.
  PromptEncoder(const Manifest& manifest, const Tokenizer& tokenizer, std::optional<int64_t> max_tiles, FindGraph graph)
      : manifest_(manifest),
        tokenizer_(tokenizer),
        max_tiles_(max_tiles),
        image_(manifest.image ? std::optional(at_most(*manifest.image, max_tiles)) : std::nullopt),
        graph_(std::move(graph)) {}

  /// Render a dialogue, encode its images and videos, and lay everything out as the decoder's input. What does not fit
  /// the context is refused before anything is embedded. Throws InputError for that, and for an unusable message, image
  /// or video.
  EncodedPrompt prepare(const std::vector<Message>& messages, Stats& stats,
                        Conversation* conversation = nullptr) const {
    check_parts(messages);
    check_characters(manifest_, messages);
    std::vector<JudgedTurn> turns;
    const std::vector<Run> runs = render(messages, manifest_.prompt, tokenizer_, turns);
    const Clock clock;
    const std::vector<Seen> seen = see(runs, messages, stats, conversation);
    stats.vision_ms = clock.ms();
    return assemble(runs, turns, seen, stats);
  }

  /// Turns of a dialogue as a prompt of their own that ends where the prober reads the last. `seen`: their pictures
  /// and videos as the dialogue has them, which are not opened or encoded again (EncodedPrompt::seen). `probed`: how
  /// many of the last judged turns the prober reads. Throws InputError if it does not fit the context.
  EncodedPrompt prepare_seen(const std::vector<Message>& messages, const std::vector<Seen>& seen, Stats& stats,
                             size_t probed = 1) const {
    std::vector<JudgedTurn> turns;
    const std::vector<Run> runs = render(messages, manifest_.prompt, tokenizer_, turns);
    int64_t length = 0;
    for (const Run& run : runs) length += static_cast<int64_t>(run.ids.size());
    for (const Seen& one : seen) length += one.rows();
    check_length(manifest_, length);
    turns.erase(turns.begin(), turns.end() - static_cast<std::ptrdiff_t>(std::min(probed, turns.size())));
    std::vector<Seen> in_order;  // as the template has them
    size_t next[2] = {0, 0};     // in `seen`: the next picture, and the next video
    for (const Run& run : runs) {
      if (run.slot.empty()) continue;
      const bool video = run.slot == "video";
      while (seen.at(next[video]).video != video) ++next[video];
      in_order.push_back(seen[next[video]++]);
    }
    EncodedPrompt prompt = assemble(runs, turns, in_order, stats);
    if (const auto& last = prompt.probed.back(); !last.empty()) {
      const auto end = static_cast<size_t>(last.back() + 1);
      prompt.inputs_embeds.data.resize(end * static_cast<size_t>(prompt.inputs_embeds.width));
      prompt.keys.resize(end);
      prompt.positions.resize(end);
    }
    return prompt;
  }

  /// The frames of a video, or those groups of them that the model reads as one, each as a video of its own; nothing if
  /// there is only one. `seen`: the video, as a prompt has it.
  std::vector<std::pair<VideoPart, Seen>> single_frames(const VideoPart& video, const std::vector<Seen>& seen) const {
    const size_t at_a_time = image_ && image_->native ? static_cast<size_t>(image_->native->frames) : 1;
    const auto count = static_cast<int64_t>((video.frames.size() + at_a_time - 1) / at_a_time);
    std::vector<std::pair<VideoPart, Seen>> found;
    if (count < 2) return found;
    Rows rows;
    for (const Seen& one : seen) {
      for (size_t i = one.first; i < one.last; ++i) {
        const Rows& part = one.laid->at(i).rows;
        rows.width = part.width;
        rows.append(part.row(0), part.count());
      }
    }
    const int64_t each = rows.count() / count, newline = rows.count() % count;  // the latter where rows are pooled
    for (int64_t i = 0; i < count; ++i) {
      Rows own{rows.width, {}};
      own.append(rows.row(i * each), each);
      own.append(rows.row(count * each), newline);
      const auto start = static_cast<size_t>(i) * at_a_time;
      Seen frame{seen[0].sha256, seen[0].key + " frame " + std::to_string(start), nullptr, 0, 1, seen[0].grid};
      frame.laid = std::make_shared<const std::vector<Laid>>(std::vector<Laid>{{{}, std::move(own)}});
      frame.video = true;
      VideoPart part;
      for (size_t n = start; n < std::min(start + at_a_time, video.frames.size()); ++n) {
        part.frames.push_back(video.frames[n]);
      }
      found.emplace_back(std::move(part), std::move(frame));
    }
    return found;
  }

  /// A prompt of one user turn without pictures, given as the token ids of the whole rendered prompt.
  EncodedPrompt prepare_ids(const std::vector<int64_t>& token_ids, Stats& stats) const {
    const Clock clock;
    check_length(manifest_, static_cast<int64_t>(token_ids.size()));
    std::vector<JudgedTurn> turns;
    render({{"user", {}}}, manifest_.prompt, tokenizer_, turns);
    turns.at(0).end = {static_cast<int64_t>(token_ids.size()), 0};  // the rendering ends where the prompt does
    PositionCounter counter(manifest_.rotary);
    counter.text(static_cast<int64_t>(token_ids.size()));
    EncodedPrompt prompt{embed(token_ids), token_ids, {}, std::move(counter.positions), {}};
    std::vector<int64_t> text(token_ids.size());
    std::iota(text.begin(), text.end(), int64_t{0});
    for (const int64_t id : token_ids) prompt.keys.emplace_back("", id);
    prompt.probed = probed_positions(manifest_.prober, turns, text, {});
    stats.embed_ms = clock.ms();
    stats.prompt_tokens = prompt.inputs_embeds.count();
    return prompt;
  }

 private:
  /// A rendered dialogue as the decoder's input. `seen`: what stands in its places for pictures and videos.
  EncodedPrompt assemble(const std::vector<Run>& runs, const std::vector<JudgedTurn>& turns,
                         const std::vector<Seen>& seen, Stats& stats) const {
    const Clock clock;
    EncodedPrompt prompt{{manifest_.dims.hidden_size, {}}, {}, {}, {}, {}};
    PositionCounter counter(manifest_.rotary);
    std::vector<int64_t> text_positions, sizes;
    const auto add_tokens = [&](const std::vector<int64_t>& ids, bool between) {
      const Rows rows = embed(ids);
      for (const int64_t id : ids) {
        if (!between) text_positions.push_back(static_cast<int64_t>(prompt.keys.size()));
        prompt.keys.emplace_back("", id);
      }
      prompt.inputs_embeds.append(rows.row(0), rows.count());
      prompt.token_ids.insert(prompt.token_ids.end(), ids.begin(), ids.end());
      counter.text(static_cast<int64_t>(ids.size()));
    };
    auto next = seen.begin();
    for (const Run& run : runs) {
      if (run.slot.empty()) {
        add_tokens(run.ids, next != seen.end() && next->row);  // between groups of a video's frames
        continue;
      }
      if (next == seen.end()) throw std::logic_error("PromptEncoder: more places for pictures than pictures");
      int64_t row = next->row;
      for (size_t i = next->first; i < next->last; ++i) {
        const Laid& part = next->laid->at(i);
        if (!part.ids.empty()) add_tokens(part.ids, false);
        if (part.rows.count()) prompt.add_picture(std::shared_ptr<const Rows>(next->laid, &part.rows));
        for (int64_t n = 0; n < part.rows.count(); ++n) prompt.keys.emplace_back(next->key, row++);
        if (part.rows.count()) counter.picture(part.rows.count(), next->grid, next->times);
      }
      sizes.push_back(next++->rows());
    }
    prompt.positions = std::move(counter.positions);
    prompt.probed = probed_positions(manifest_.prober, turns, text_positions, sizes);
    prompt.seen = seen;
    stats.embed_ms = clock.ms();
    stats.prompt_tokens = prompt.inputs_embeds.count();
    return prompt;
  }

  /// The frames of a video as the image graph reads them.
  struct Frames {
    std::vector<Image> images;
    std::optional<std::array<int64_t, 2>> grid;  // as in Seen
    std::vector<int64_t> times = {0};
    bool apart = false;  // text stands between groups of frames
  };

  /// The dialogue's pictures and videos, in the order of `runs`. One is opened and encoded after the other, so one is
  /// in memory at a time; and only as long as they fit the context. What is shown twice, or what the conversation
  /// knows, is not encoded again.
  std::vector<Seen> see(const std::vector<Run>& runs, const std::vector<Message>& messages, Stats& stats,
                        Conversation* conversation) const {
    std::vector<const ImageLike*> pictures;
    std::vector<const VideoPart*> videos;
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        if (const auto* picture = std::get_if<ImageLike>(&part)) pictures.push_back(picture);
        if (const auto* video = std::get_if<VideoPart>(&part)) videos.push_back(video);
      }
    }
    const int64_t least = least_rows();
    int64_t length = static_cast<int64_t>(pictures.size()) * least;
    for (const Run& run : runs) length += static_cast<int64_t>(run.ids.size());
    check_length(manifest_, length, pictures.empty());
    Encoded encoded;
    const auto take = [&](const Image* images, size_t count, const std::string& use,
                          const std::function<std::vector<Laid>()>& encode) {
      const std::string sha256 = digest(images, count), key = use + " " + sha256;
      auto& laid = encoded[key];
      if (!laid && conversation && conversation->images.count(key)) laid = conversation->images[key];
      if (!laid) laid = std::make_shared<const std::vector<Laid>>(encode());
      return Seen{sha256, key, laid, 0, laid->size(), {}};
    };
    std::vector<Seen> seen;
    size_t shown = 0, played = 0;  // pictures, and videos, so far
    int64_t further = 0;           // places in the prompt of the video before, which follow each other
    for (const Run& run : runs) {
      if (run.slot == "video" && further) {
        --further;
        Seen group = seen.back();
        group.row += group.rows();
        group.first = group.last++;
        seen.push_back(std::move(group));
      } else if (run.slot == "image") {
        const bool alone = pictures.size() == 1;
        const Pixels picture = open_image(*pictures.at(shown++));
        std::optional<std::array<int64_t, 2>> grid;
        if (image_->native) {  // its rows are known before it is encoded
          grid = native_grid(picture->height, picture->width, *image_);
          check_length(manifest_, length - least + (*grid)[0] * (*grid)[1], false);
        }
        seen.push_back(take(picture.get(), 1, alone || grid ? "a picture" : "one of several",
                            [&] { return encode_image(*picture, alone, stats); }));
        seen.back().grid = grid;
        length += seen.back().rows() - least;
      } else if (run.slot == "video") {
        const Frames frames = open_frames(*videos.at(played++), length);
        std::string use = "a video";
        if (frames.grid && !frames.apart) {  // the KV caches hold its rows turned by their times
          for (const int64_t time : frames.times) use += " " + std::to_string(time);
        }
        const auto encode = [&] { return encode_frames(frames, stats); };
        seen.push_back(take(frames.images.data(), frames.images.size(), use, encode));
        seen.back().grid = frames.grid;
        seen.back().times = frames.times;
        seen.back().video = true;
        length += seen.back().rows();
        if (frames.apart) {
          further = static_cast<int64_t>(std::exchange(seen.back().last, 1)) - 1;
        }
      }
      check_length(manifest_, length, shown == pictures.size() && played == videos.size());
    }
    if (conversation) conversation->images = encoded;
    return seen;
  }

  /// Rows of the smallest picture: those of one tile.
  int64_t least_rows() const {
    for (const auto& [name, output] : image_graphs()) {
      const auto graph = manifest_.graphs.find(name);
      if (graph == manifest_.graphs.end()) continue;
      for (const TensorSpec& tensor : graph->second.outputs) {
        if (tensor.name != output || tensor.shape.size() < 2) continue;
        if (const auto* rows = std::get_if<int64_t>(&tensor.shape[1])) return *rows;
      }
    }
    return 1;
  }

  /// Throws InputError for pictures and videos that this model cannot take, before any is opened.
  void check_parts(const std::vector<Message>& messages) const {
    int64_t videos = 0, frames = 0, rows = 0;
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        if (std::holds_alternative<ImageLike>(part) && !manifest_.image) throw InputError("this model takes no images");
        const auto* video = std::get_if<VideoPart>(&part);
        if (!video) continue;
        if (!manifest_.video) throw InputError("this model takes no videos");
        if (video->frames.empty()) throw InputError("a video has no frames");
        check_seconds(*video);  // whether the model reads them or not
        const auto count = static_cast<int64_t>(video->frames.size());
        ++videos;
        frames += count;
        rows += least_rows(count);
      }
    }
    if (videos && rows >= manifest_.dims.context_length) {
      throw InputError("the video takes " + std::to_string(rows) + " tokens (" + std::to_string(frames) +
                       " frames); the model's context holds " + std::to_string(manifest_.dims.context_length) +
                       "; take fewer frames");
    }
  }

  /// Rows of a video of so many frames, which may be larger where pictures have any size.
  int64_t least_rows(int64_t frames) const {
    if (image_->native) return (frames + image_->native->frames - 1) / image_->native->frames;
    return frames * *manifest_.video->pooled_side * *manifest_.video->pooled_side + 1;
  }

  /// One image -> its rows, with the token ids around and between them.
  std::vector<Laid> encode_image(const Image& picture, bool alone, Stats& stats) const {
    const ImageSpec& spec = image_.value();
    const Tiles tiles = cut(picture, spec, alone);
    const Rows pixel_values = normalise(tiles.images, spec);
    std::vector<Rows> rows;
    if (spec.native) {
      rows.push_back(encode_whole(pixel_values, tiles.grid));
    } else if (manifest_.graphs.count("image_tokenizer")) {
      rows.push_back(embed(tokenize_image(pixel_values)));
    } else {
      rows = encode_tiles(pixel_values, picture.height, picture.width);
    }
    stats.image_tiles += spec.native ? tiles.grid[0] * tiles.grid[1] : pixel_values.count();
    return lay_out(std::move(rows), tiles.grid, spec);
  }

  /// pixel_values (tiles, 3 * size * size) of one image -> its token ids, in order.
  std::vector<int64_t> tokenize_image(const Rows& pixel_values) const {
    std::vector<int64_t> ids;
    run_tiles("image_tokenizer", pixel_values, [&](const Subgraph& graph, int64_t, const auto& outputs) {
      const auto [found, count] = values<int64_t>(outputs.at("input_ids"), graph);
      ids.insert(ids.end(), found, found + count);
    });
    return ids;
  }

  /// pixel_values (frames, 3 * height * width) of a `native` picture -> its rows, one for each tile of `grid`.
  Rows encode_whole(const Rows& pixel_values, const std::array<int64_t, 2>& grid) const {
    const int64_t size = image_->tile_size, count = grid[0] * grid[1];
    const int64_t depth = (1 + manifest_.deepstack()) * manifest_.dims.hidden_size;
    const auto encoder = graph_("vision_encoder");
    const auto outputs = encoder->run(
        Tensor<float>::view(pixel_values.row(0), {pixel_values.count(), 3, grid[0] * size, grid[1] * size}));
    Rows rows{depth, {}};
    rows.append(floats(outputs.at("image_features"), count * depth, *encoder), count);
    return rows;
  }

  /// pixel_values (tiles, 3 * size * size) of one image (height, width) -> its runs of rows (n, D): one for each tile,
  /// or a single one for `anyres` and `closest_grid`, which join the tiles.
  std::vector<Rows> encode_tiles(const Rows& pixel_values, int64_t height, int64_t width) const {
    const ImageSpec& spec = image_.value();
    const int64_t depth = manifest_.dims.hidden_size;
    std::vector<Rows> runs;
    Rows newline{depth, {}};
    run_tiles("vision_encoder", pixel_values, [&](const Subgraph& graph, int64_t tiles, const auto& outputs) {
      const auto [features, count] = values<float>(outputs.at("image_features"), graph);
      const int64_t each =
          spec.anyres ? spec.anyres->tokens_per_side * spec.anyres->tokens_per_side : count / (tiles * depth);
      floats(outputs.at("image_features"), tiles * each * depth, graph);  // checks the size
      for (int64_t tile = 0; tile < tiles; ++tile) {
        runs.push_back({depth, {features + tile * each * depth, features + (tile + 1) * each * depth}});
      }
      if (spec.anyres && newline.data.empty()) newline.append(floats(outputs.at("image_newline"), depth, graph), 1);
    });
    if (!spec.anyres && !spec.closest_grid) return runs;
    Rows together{depth, {}};
    for (const Rows& run : runs) together.append(run.row(0), run.count());
    if (spec.anyres) together = pack(together, newline, height, width, spec);
    return {std::move(together)};
  }

  /// Open the frames of a video. `others`: how many positions the rest of the prompt takes at least. Frames of any size
  /// are opened once it is known from the first that they fit the context.
  Frames open_frames(const VideoPart& video, int64_t others) const {
    const int64_t side = image_.value().tile_size, count = static_cast<int64_t>(video.frames.size());
    Frames frames;
    int64_t height = side, width = side;
    if (image_->native) {
      const int64_t group = image_->native->frames;
      const std::vector<int64_t> times =
          group_positions(moments(video), group, manifest_.video->native.value().tokens_per_second);
      const Pixels first = open_image(video.frames.at(0));
      frames.grid = frame_grid(first->height, first->width, count, *image_, *manifest_.video, max_tiles_);
      const auto groups = static_cast<int64_t>(times.size());
      check_length(manifest_, others + groups * (*frames.grid)[0] * (*frames.grid)[1], false);
      height *= (*frames.grid)[0];
      width *= (*frames.grid)[1];
      picture::check_size(height, width, count);
      frames.apart = manifest_.prompt.frame_group.has_value();
      if (!frames.apart) frames.times = times;
    }
    for (const ImageLike& frame : video.frames) frames.images.push_back(squeeze(*open_image(frame), height, width));
    return frames;
  }

  /// The frames of a video -> its rows: one run, or one for each group of frames if text stands between them.
  std::vector<Laid> encode_frames(const Frames& frames, Stats& stats) const {
    if (!frames.grid) return {{{}, encode_video(frames.images, stats)}};
    std::vector<Laid> runs;
    const auto group = static_cast<size_t>(image_->native->frames);
    for (size_t first = 0; first < frames.images.size(); first += group) {
      std::vector<Image> images;
      for (size_t i = first; i < first + group; ++i) {
        images.push_back(frames.images[std::min(i, frames.images.size() - 1)]);
      }
      Rows rows = encode_whole(normalise(images, manifest_.video.value()), *frames.grid);
      stats.image_tiles += rows.count();
      if (frames.apart || runs.empty()) {
        runs.push_back({{}, std::move(rows)});
      } else {
        runs.back().rows.append(rows.row(0), rows.count());
      }
    }
    return runs;
  }

  /// A video's tiles -> its rows: pooled rows of each frame, and one newline row at the very end.
  Rows encode_video(const std::vector<Image>& frames, Stats& stats) const {
    const int64_t depth = manifest_.dims.hidden_size, side = image_.value().anyres.value().tokens_per_side;
    Rows rows{depth, {}}, newline{depth, {}};
    for (size_t first = 0; first < frames.size(); first += kTilesPerRun) {
      const size_t end = std::min<size_t>(first + kTilesPerRun, frames.size());
      const std::vector<Image> tiles(frames.begin() + static_cast<std::ptrdiff_t>(first),
                                     frames.begin() + static_cast<std::ptrdiff_t>(end));
      const Rows pixel_values = normalise(tiles, manifest_.video.value());
      run_tiles("vision_encoder", pixel_values, [&](const Subgraph& graph, int64_t count, const auto& outputs) {
        const int64_t all = count * side * side;
        Rows features{depth, {}};
        features.append(floats(outputs.at("image_features"), all * depth, graph), all);
        const Rows pooled = pool(features, side, manifest_.video->pooled_side.value());
        rows.append(pooled.row(0), pooled.count());
        newline.data.clear();
        newline.append(floats(outputs.at("image_newline"), depth, graph), 1);
      });
    }
    rows.append(newline.row(0), 1);
    stats.image_tiles += static_cast<int64_t>(frames.size());
    return rows;
  }

  /// Run an image graph, a few tiles at a time; `use` takes the outputs of each run.
  template <class Use>
  void run_tiles(const char* name, const Rows& pixel_values, const Use& use) const {
    const int64_t size = image_.value().tile_size;
    const auto encoder = graph_(name);
    for (int64_t first = 0; first < pixel_values.count(); first += kTilesPerRun) {
      const int64_t tiles = std::min(kTilesPerRun, pixel_values.count() - first);
      use(*encoder, tiles, encoder->run(Tensor<float>::view(pixel_values.row(first), {tiles, 3, size, size})));
    }
  }

  /// Token ids (n) -> their embeddings (n, D), a few at a time: onnxruntime's arena keeps the memory of its largest
  /// run.
  Rows embed(const std::vector<int64_t>& token_ids) const {
    const auto table = graph_("embed_tokens");
    const auto size = static_cast<int64_t>(token_ids.size());
    Rows rows{manifest_.dims.hidden_size, {}};
    rows.data.reserve(token_ids.size() * static_cast<size_t>(rows.width));
    for (int64_t first = 0; first < size; first += kPrefillChunk) {
      const int64_t n = std::min(kPrefillChunk, size - first);
      const auto outputs = table->run(Tensor<int64_t>::view(token_ids.data() + first, {1, n}));
      rows.append(floats(outputs.at("inputs_embeds"), n * rows.width, *table), n);
    }
    return rows;
  }

  const Manifest& manifest_;
  const Tokenizer& tokenizer_;
  const std::optional<int64_t> max_tiles_;
  const std::optional<ImageSpec> image_;  // how pictures are cut, nothing if the model takes none
  const FindGraph graph_;
};

}  // namespace autosteer
