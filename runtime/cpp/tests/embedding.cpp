// Uses libautosteer as a product would, for tests/cpp/test_cpp_library.py: embedding CHECK PACKAGE [ARGUMENT...]
// prints what happened, a line of JSON or text at a time.
#include <atomic>
#include <autosteer/autosteer.hpp>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <thread>

namespace {

using autosteer::Engine;
using autosteer::Message;
using autosteer::Messages;
using Arguments = std::vector<std::string>;

autosteer::Settings greedy() {
  autosteer::Settings settings;
  settings.max_tokens = 8;
  return settings;
}

autosteer::EngineOptions one_thread() {
  autosteer::EngineOptions options;
  options.threads = 1;
  return options;
}

/// FILE RGB WIDTH HEIGHT: the picture by its name, by its bytes, and by its pixels with padded rows.
void pictures(const Engine& engine, const Arguments& arguments) {
  const auto read = [](const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::vector<char>{std::istreambuf_iterator<char>(file), {}};
  };
  const std::vector<char> bytes = read(arguments.at(0)), rgb = read(arguments.at(1));
  const size_t width = std::stoul(arguments.at(2)), height = std::stoul(arguments.at(3)), stride = 3 * width + 7;
  std::vector<uint8_t> padded(stride * height, 99);
  for (size_t y = 0; y < height; ++y) std::memcpy(&padded[y * stride], &rgb[3 * y * width], 3 * width);
  const auto data = autosteer::Image::from_rgb(static_cast<int64_t>(width), static_cast<int64_t>(height), padded.data(),
                                               static_cast<int64_t>(stride));
  for (const autosteer::Image& image :
       {autosteer::Image(arguments.at(0)), autosteer::Image::from_bytes(bytes.data(), bytes.size()), data}) {
    std::cout << engine.generate({Message::user("look", {image})}, greedy()).json << "\n";
    std::cout << engine.count_tokens({Message::user("look", {image, image})}) << "\n";
    std::cout << engine.generate({Message::user("look", {}, {{image, image}})}, greedy()).json << "\n";
  }
}

/// PROMPT: milliseconds to the first token, then of an answer that is cancelled while it reads the prompt, its code,
/// and whether the conversation's next answer is that of a fresh one.
void cancel(const Engine& engine, const Arguments& arguments) {
  using Clock = std::chrono::steady_clock;
  const Messages prompt = {Message::user(arguments.at(0))};
  const auto ms = [](Clock::time_point from) {
    return std::chrono::duration<double, std::milli>(Clock::now() - from).count();
  };
  double whole = 1e9, cut = 1e9;
  bool alike = true, cancelled = false;
  for (int i = 0; i < 5; ++i) {
    auto first = Clock::now();
    engine.stream(prompt, greedy()).next();
    whole = std::min(whole, ms(first));
    const autosteer::Conversation conversation = engine.conversation();
    int code = 0;
    {
      autosteer::Stream stream = conversation.stream(prompt, greedy());
      std::thread other([&] {
        std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(whole / 5));
        stream.cancel();
      });
      first = Clock::now();
      try {
        stream.next();
      } catch (const autosteer::Error& err) {
        code = err.code;
      }
      const double took = ms(first);
      other.join();
      if (code == 0) continue;  // on a busy machine the other thread may come too late
      cut = std::min(cut, took);
      cancelled = true;
      try {
        alike = alike && !stream.next();
      } catch (const autosteer::Error&) {
        alike = false;
      }
    }
    alike = alike && code == AUTOSTEER_CANCELLED;
    alike = alike && conversation.generate(prompt, greedy()).text == engine.generate(prompt, greedy()).text;
  }
  std::cout << whole << "\n" << cut << "\n" << (alike && cancelled) << "\n";
}

/// The code of an answer that was cancelled before it began, and what it says.
void cancel_early(const Engine& engine, const Arguments&) {
  autosteer::Stream stream = engine.stream("red");
  stream.cancel();
  try {
    const auto chunk = stream.next();
    std::cout << "an answer: " << chunk->text << "\n";
  } catch (const autosteer::Error& err) {
    std::cout << err.code << " " << err.what() << "\n";
  }
}

/// Number of pieces that a callback sees that stops after two, and that one sees that returns nothing.
void callback(const Engine& engine, const Arguments&) {
  int stopped = 0, seen = 0;
  engine.generate({Message::user("red")}, greedy(), [&](const autosteer::Chunk&) { return ++stopped < 2; });
  engine.generate({Message::user("red")}, greedy(), [&](const autosteer::Chunk&) { ++seen; });
  std::cout << stopped << "\n" << seen << "\n";
}

void info(const Engine& engine, const Arguments&) {
  const autosteer_info& info = engine.info();
  std::cout << info.precision << " " << info.onnxruntime << " " << info.context_length << " " << info.guarded << " "
            << info.takes_images << " " << info.takes_videos << " " << info.threshold << " " << info.strength << "\n"
            << engine.count_tokens({Message::user("red red")}) << "\n";
}

/// The action for a prompt whose prober fails, and what is logged of it.
void log(const Engine& engine, const Arguments&) {
  std::string lines;
  autosteer_set_log([](const char* line, void* context) { *static_cast<std::string*>(context) += line; }, &lines);
  std::cout << engine.generate("crash", greedy()).verdict.action << "\n";
  autosteer_set_log(nullptr, nullptr);
  engine.generate("crash", greedy());
  std::cout << lines << "\n";
  autosteer_set_log([](const char*, void*) { throw 1; }, nullptr);
  std::cout << engine.generate("crash", greedy()).verdict.action << "\n";
}

/// Action, unsafe and p_unsafe under each policy for an unsafe prompt, and for a harmless one.
void score(const Engine& engine, const Arguments&) {
  autosteer::Settings settings;
  const auto show = [&](const char* prompt) {
    const autosteer::Verdict verdict = engine.score(prompt, settings);
    std::cout << verdict.action << " " << verdict.unsafe << " " << verdict.p_unsafe << "\n";
  };
  for (const char* policy : {"steer", "stop", "report", "off"}) {
    settings.policy = policy;
    show("bad");
  }
  settings.policy = "steer";
  show("hello");
}

/// Print the error of what must be refused.
void refused(const std::function<void()>& attempt) {
  try {
    attempt();
    std::cout << "no error\n";
  } catch (const autosteer::Error& err) {
    std::cout << err.code << " " << err.what() << "\n";
  }
}

/// What a NUL in a text, a role, and names of files says.
void nul(const Engine& engine, const Arguments&) {
  using namespace std::string_literals;
  const std::vector<std::function<void()>> tries = {
      [&] { engine.generate("red\0bad"s); },
      [&] {
        engine.score({Message{"user\0"s, {"red"}}});
      },
      [&] { autosteer::Image("a.png\0b.png"s); },
      [&] { Engine("package\0"s); },
  };
  for (const auto& attempt : tries) refused(attempt);
}

/// What parts made by hand say: a video of two frames and one second, a picture that is none.
void parts(const Engine& engine, const Arguments&) {
  const uint8_t pixel[3] = {};
  const auto frame = autosteer::Image::from_rgb(1, 1, pixel);
  const autosteer::Part video(autosteer::Video{frame, frame}, {0.0});
  refused([&] {
    engine.score({Message{"user", {video, "red"}}});
  });
  autosteer::Part picture(frame);
  picture.frames.clear();
  refused([&] {
    engine.score({Message{"user", {picture, "red"}}});
  });
}

/// Whether four threads on one engine get what one thread gets.
void threads(const Engine& engine, const Arguments&) {
  const std::vector<std::string> prompts = {"red", "bad", "hello", "red red"};
  std::vector<std::string> alone, together(prompts.size());
  for (const auto& prompt : prompts) alone.push_back(engine.generate(prompt).text);
  std::vector<std::thread> workers;
  for (size_t i = 0; i < prompts.size(); ++i) {
    workers.emplace_back([&, i] {
      for (int n = 0; n < 20; ++n) {
        if (const std::string text = engine.generate(prompts[i]).text; n == 0 || text != alone[i]) together[i] = text;
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  std::cout << (alone == together) << "\n";
}

/// A dialogue in a conversation, with every setting and texts that JSON must escape.
void settings(const Engine& engine, const Arguments&) {
  autosteer::Settings settings = greedy();
  settings.threshold = -0.5;  // everything is steered, which shows the strength
  settings.pieces = false;    // and nothing of it is judged
  settings.strength = 0.5;
  settings.temperature = 0.5;
  settings.top_k = 3;
  settings.top_p = 0.5;
  settings.min_p = 0.1;
  settings.repetition_penalty = 1.5;
  settings.presence_penalty = 0.5;
  settings.frequency_penalty = -0.25;
  settings.seed = 7;
  settings.speculate = false;
  settings.stop = {"a \"quoted\" \\ line\n\x01", "\u00fc"};
  const auto conversation = engine.conversation();
  Messages dialogue = {Message::user("red \"} \\")};
  dialogue.push_back(Message::assistant(conversation.generate(dialogue, settings).text));
  dialogue.push_back({"user", {"hello"}});
  std::cout << conversation.generate(dialogue, settings).json << "\n";
  settings.policy = "stop";
  std::cout << conversation.generate(dialogue, settings).finish_reason << "\n";
  settings.threshold = std::strtod("nan", nullptr);
  try {
    conversation.generate(dialogue, settings);
  } catch (const autosteer::Error& err) {
    std::cout << err.code << "\n";
  }
}

/// The answers to a harmless prompt without and with biases.
void bias(const Engine& engine, const Arguments&) {
  autosteer::Settings settings = greedy();
  std::cout << engine.generate("red", settings).text << "\n";
  settings.logit_bias = {{engine.generate("red", settings).token_ids.at(0), -100}, {3, 0.25}};
  std::cout << engine.generate("red", settings).text << "\n";
}

/// Never called: these compile, as somebody would write them.
[[maybe_unused]] void spellings(const Engine& engine, const std::string& text, const std::filesystem::path& file) {
  const autosteer::Image image = autosteer::Image::from_bytes("", 0);
  const std::vector<autosteer::Image> images = {image, "b.png", text, file};
  engine.generate("hello");
  engine.generate(text);
  engine.generate({Message::user("hello")});
  engine.generate({Message::user("hello", {"a.png"})});
  engine.generate({Message::user("hello", {"a.png", "b.png"})});
  engine.generate({Message::user(text, {text})});
  engine.generate({Message::user(text, {file, image})});
  engine.generate({Message::user("hello", images)});
  engine.generate({Message::user("hello", {}, {images, {image}})});
  engine.generate({Message::system("be brief"), Message::user("hello"), Message::assistant(text), {"user", {"more"}}});
  engine.generate({{"user", {"between", image, "and", autosteer::Video{image, image}}}});
  engine.generate({Message::user("hello")}, autosteer::Settings{},
                  [](const autosteer::Chunk& chunk) { std::cout << chunk.text; });
  for (auto& chunk : engine.stream("hello")) std::cout << chunk.text;
  for (autosteer::Chunk chunk : engine.stream({Message::user("hello")})) std::cout << chunk.text;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::map<std::string, std::function<void(const Engine&, const Arguments&)>> checks = {
      {"pictures", pictures}, {"cancel", cancel},     {"cancel_early", cancel_early},
      {"callback", callback}, {"info", info},         {"log", log},
      {"threads", threads},   {"settings", settings}, {"score", score},
      {"nul", nul},           {"bias", bias},         {"parts", parts}};
  if (argc < 3) return 2;
  checks.at(argv[1])(Engine(argv[2], one_thread()), {argv + 3, argv + argc});
  return 0;
} catch (const autosteer::Error& err) {
  std::cerr << "embedding: " << err.what() << "\n";
  return err.code;
}
