// How bodies are called: a row goes through all calls of all parts before the next row does.
#pragma once

namespace titans_graph {

// Where an argument or a result lies: the first row's in the first thread, and bytes from one row or thread to the next.
struct Place {
  char* start;
  int64_t row, thread;
};

// Calls of one body, one after the other; the table has the places of the arguments and then the results of every call.
struct Part {
  void (*body)(const Place* table, int64_t calls, int64_t row, int64_t thread, char* space);
  const Place* table;
  int64_t calls;
};

static void run_parts(const Part* parts, int64_t count, int64_t rows, int64_t threads, char* spaces, int64_t bytes) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t thread = omp_get_thread_num();
    for (const Part* part = parts; part != parts + count; part++)
      part->body(part->table, part->calls, row, thread, spaces + thread * bytes);
  }
}

static void run_once(
    decltype(Part::body) body, const Place* table, int64_t rows, int64_t threads, char* spaces, int64_t bytes) {
  const Part part{body, table, 1};
  run_parts(&part, 1, rows, threads, spaces, bytes);
}

}  // namespace titans_graph
