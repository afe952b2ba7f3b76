// A video file -> its frames, decoded by the program ffmpeg in a process of its own. The C++ side of runtime/ffmpeg.py.
//
//     file  ->  when each frame is shown: a line of text for each
//           ->  the chosen ones, as PNG files one after the other
//
// Whoever made the file is not trusted. ffmpeg gets it as its standard input, so it never sees a name; it may read the
// containers in kContainers, none of which is a playlist; and it is killed at the first frame too many and after
// kSeconds.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "picture.hpp"

extern char** environ;

namespace autosteer::ffmpeg {

constexpr int64_t kSeconds = 60;         // to decode a file in, which is done twice
constexpr int64_t kMaxFrames = 100'000;  // of a file: an hour
constexpr size_t kLine = 1000;           // bytes of a line that are read
/// ffmpeg's names; "mov" is MP4, too.
const char* const kContainers = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif,apng";
const char* const kOneEach = "setpts=N/TB";  // with -r 1: every frame that is left, none twice
/// A line "frame:0    pts:0       pts_time:0" for each frame, and one of ours: of the file's own words none is printed.
const char* const kTimes = "settb=1/1000000,metadata=add:key=autosteer:value=0,metadata=print:key=autosteer:file=-,";

using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;

struct Deadline {
  int64_t seconds;
  Clock::time_point at = Clock::now() + std::chrono::seconds(seconds);
};

/// Owns a file descriptor. Those that are opened here are not inherited by programs that this one starts.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

struct Pipe {
  Descriptor from, to;

  static Pipe open() {
    std::array<int, 2> ends{};
    if (pipe2(ends.data(), O_CLOEXEC)) throw Error("no pipe: " + std::string(std::strerror(errno)));
    return {Descriptor(ends[0]), Descriptor(ends[1])};
  }
};

/// Open a file. Throws InputError if it cannot be opened, and for a pipe or a device, which is not waited for.
inline Descriptor open_regular(const std::filesystem::path& path) {
  Descriptor file(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  if (file.get() < 0) throw InputError(std::strerror(errno));
  struct stat facts {};
  if (fstat(file.get(), &facts) || !S_ISREG(facts.st_mode)) throw InputError("not a file");
  return file;
}

/// Where the PNG file that `bytes` begins with ends; 0 if it is not there yet.
inline size_t png_end(const Bytes& bytes) {
  for (size_t at = 8; at + 12 <= bytes.size();) {  // a chunk: length, type, data, CRC
    const uint8_t* chunk = bytes.data() + at;
    at += 12 + (size_t{chunk[0]} << 24 | size_t{chunk[1]} << 16 | size_t{chunk[2]} << 8 | size_t{chunk[3]});
    if (!std::memcmp(chunk + 4, "IEND", 4) && at <= bytes.size()) return at;
  }
  return 0;
}

/// Whether `line` says when a frame is shown; `time` receives that, in microseconds, if the file says so.
inline bool is_frame(const std::string& line, std::optional<int64_t>& time) {
  const char* at = line.c_str();
  const auto skip = [&](const char* letters) { return at += std::strspn(at, letters); };
  if (std::strncmp(at, "frame:", 6) != 0) return false;
  at += 6;
  if (const char* number = at; skip("0123456789") == number) return false;
  if (const char* spaces = at; skip(" ") == spaces) return false;
  if (std::strncmp(at, "pts:", 4) != 0) return false;
  at += 4;
  char* end = nullptr;
  const bool number = *at == '-' || ('0' <= *at && *at <= '9');
  const int64_t value = number ? std::strtoll(at, &end, 10) : 0;
  if (end && end != at) time = value;
  return true;
}

/// ffmpeg's first line, without the address that it begins with.
inline std::string first_line(const std::string& said) {
  const std::string line = said.substr(0, said.find('\n'));
  if (line.empty()) return "it failed without a word";
  const size_t address = line[0] == '[' ? line.find("] ") : std::string::npos;
  return address == std::string::npos ? line : line.substr(address + 2);
}

/// ffmpeg, started on a file; killed when this ends.
class Child {
 public:
  /// `output`: its command line after the input. Throws InputError if there is no ffmpeg.
  Child(const Descriptor& file, const std::vector<std::string>& output) {
    std::vector<std::string> words = {"ffmpeg", "-v", "error", "-nostdin"};
    words.insert(words.end(), {"-xerror"});  // a damaged file is refused, like a damaged picture
    words.insert(words.end(), {"-protocol_whitelist", "file,pipe", "-format_whitelist", kContainers});
    words.insert(words.end(), {"-max_pixels", std::to_string(picture::kMaxPixels)});
    words.insert(words.end(), {"-i", "/dev/fd/0"});  // unlike pipe:0 it can be sought in
    words.insert(words.end(), output.begin(), output.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    Pipe out = Pipe::open(), said = Pipe::open();
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, file.get(), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out.to.get(), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, said.to.get(), STDERR_FILENO);
    posix_spawnattr_t signals;  // a host may block or ignore some; ffmpeg must end on Ctrl-C, and when we have gone
    posix_spawnattr_init(&signals);
    sigset_t none, usual;
    sigemptyset(&none), sigemptyset(&usual);
    for (const int signal : {SIGINT, SIGTERM, SIGPIPE}) sigaddset(&usual, signal);
    posix_spawnattr_setsigmask(&signals, &none);
    posix_spawnattr_setsigdefault(&signals, &usual);
    posix_spawnattr_setflags(&signals, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    const int error = posix_spawnp(&process_, "ffmpeg", &actions, &signals, arguments.data(), environ);
    posix_spawnattr_destroy(&signals);
    posix_spawn_file_actions_destroy(&actions);
    if (error == ENOENT) throw InputError("ffmpeg, which reads such files, is not installed: apt-get install ffmpeg");
    if (error) throw Error("ffmpeg does not start: " + std::string(std::strerror(error)));
    out_.emplace(std::move(out.from)), said_.emplace(std::move(said.from));
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    if (process_ < 0) return;
    kill(process_, SIGKILL);
    end();
  }

  /// Hand what it writes to `take`, in blocks. Throws InputError if it fails, or takes too long.
  void read(const Deadline& deadline, const std::function<void(const uint8_t*, size_t)>& take) {
    std::array<pollfd, 2> pipes = {{{out_->get(), POLLIN, 0}, {said_->get(), POLLIN, 0}}};
    Bytes block(1 << 16);
    std::string said;
    while (pipes[0].fd >= 0 || pipes[1].fd >= 0) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline.at - Clock::now()).count();
      const int ready = left > 0 ? poll(pipes.data(), pipes.size(), static_cast<int>(left)) : 0;
      if (ready == 0) {
        throw InputError("ffmpeg takes more than " + std::to_string(deadline.seconds) + " s to decode it");
      }
      for (pollfd& pipe : pipes) {
        if (ready < 0 || !pipe.revents) continue;  // a signal came
        const ssize_t count = ::read(pipe.fd, block.data(), block.size());
        if (count <= 0) {
          pipe.fd = -1;  // poll leaves it out
        } else if (&pipe == &pipes[0]) {
          take(block.data(), static_cast<size_t>(count));
        } else if (constexpr size_t kMost = 1000; said.size() < kMost) {
          said.append(block.begin(), block.begin() + std::min<ssize_t>(count, kMost));
        }
      }
    }
    if (end()) throw InputError("ffmpeg: " + first_line(said));
  }

 private:
  /// Wait for it. Its status, 0 if all went well.
  int end() {
    int status = -1;
    while (waitpid(process_, &status, 0) < 0 && errno == EINTR) {
    }
    process_ = -1;
    return status;
  }

  pid_t process_ = -1;
  std::optional<Descriptor> out_, said_;
};

/// An open video file. Its methods throw InputError if ffmpeg fails, or takes too long.
class VideoFile {
 public:
  explicit VideoFile(Descriptor file, int64_t seconds = kSeconds) : file_(std::move(file)), deadline_{seconds} {}

  /// When each frame is shown: from 0 on, ascending. A frame without a time has that of the frame before. Throws
  /// InputError if there are no frames, or too many.
  std::vector<double> seconds() const {
    std::vector<double> found;
    std::optional<int64_t> first;
    std::string line;  // what is there of it
    const std::string frame = kTimes + std::string("scale=1:1:flags=neighbor,format=gray,") + kOneEach;
    const auto take = [&](char letter) {
      if (letter != '\n') {
        if (line.size() < kLine) line += letter;
        return;
      }
      std::optional<int64_t> time;
      if (is_frame(std::exchange(line, {}), time)) {
        if (!first) first = time;
        const double since = time ? (static_cast<double>(*time) - static_cast<double>(*first)) / 1e6 : 0.0;
        found.push_back(std::max(since, found.empty() ? 0.0 : found.back()));
        if (static_cast<int64_t>(found.size()) > kMaxFrames) {
          throw InputError("more than " + std::to_string(kMaxFrames) + " frames");
        }
      }
    };
    Child(file_, {"-an", "-sn", "-vf", frame, "-r", "1", "-f", "null", "-"})
        .read(deadline_, [&](const uint8_t* block, size_t count) {
          std::for_each(block, block + count, [&](uint8_t byte) { take(static_cast<char>(byte)); });
        });
    if (found.empty()) throw InputError("it has no frames");
    return found;
  }

  /// Hand the frames of those indices, which ascend, to `take` as PNG files.
  void pictures(const std::vector<int64_t>& chosen, const std::function<void(const Bytes&)>& take) const {
    std::string select;
    for (const int64_t i : chosen) select += (select.empty() ? "eq(n," : "+eq(n,") + std::to_string(i) + ")";
    const std::string filter = "select='" + select + "'," + kOneEach;
    Bytes buffer;
    size_t found = 0;
    Child(file_, {"-vf", filter, "-r", "1", "-c:v", "png", "-f", "image2pipe", "pipe:1"})
        .read(deadline_, [&](const uint8_t* block, size_t count) {
          buffer.insert(buffer.end(), block, block + count);
          while (const size_t end = png_end(buffer)) {
            const auto split = buffer.begin() + static_cast<ptrdiff_t>(end);
            take(Bytes(buffer.begin(), split));
            buffer.erase(buffer.begin(), split);
            ++found;
          }
          if (buffer.size() > picture::kMaxFileBytes) {
            throw InputError("a frame of more than " + std::to_string(picture::kMaxFileBytes) + " bytes");
          }
        });
    if (!buffer.empty() || found != chosen.size()) throw InputError("it changed while it was read");
  }

 private:
  Descriptor file_;
  Deadline deadline_;
};

}  // namespace autosteer::ffmpeg
