import com.launchdarkly.eventsource.ConnectStrategy;
import com.launchdarkly.eventsource.ErrorStrategy;
import com.launchdarkly.eventsource.EventSource;
import com.launchdarkly.eventsource.FaultEvent;
import com.launchdarkly.eventsource.MessageEvent;
import com.launchdarkly.eventsource.StreamEvent;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import okhttp3.OkHttpClient;
import okhttp3.Request;
import okhttp3.Response;
import okhttp3.sse.EventSourceListener;
import okhttp3.sse.EventSources;

/**
 * Runs Java's SSE clients, each as its README has it, as many streams at once as it is told to. Reads and writes one JSON object
 * a line, as tests/clients/drivers.rs has it; ends with its standard input.
 */
public class Clients {
  /** What is read, and what is told of it. */
  record Stream(String of, String url) {
    void event(String type, String id, String data) {
      String kind = type == null ? "message" : type;
      write("{\"of\":" + json(of) + ",\"event\":{\"type\":" + json(kind) + ",\"id\":" + json(id) + ",\"data\":" + json(data) + "}}");
    }

    void error(Throwable error) {
      write("{\"of\":" + json(of) + ",\"error\":" + json(String.valueOf(error)) + "}");
    }

    void end(String text) {
      write("{\"of\":" + json(of) + ",\"end\":" + json(text) + "}");
    }
  }

  static AutoCloseable okhttpEventSource(Stream stream) {
    String url = stream.url();
    // docs: okhttp-eventsource
    EventSource source =
        new EventSource.Builder(ConnectStrategy.http(URI.create(url)).readTimeout(45, TimeUnit.SECONDS))
            .errorStrategy(ErrorStrategy.alwaysContinue()) // else the end of a response is an exception
            .build();
    // docs end
    new Thread(() -> read(source, stream::event, stream::error)).start();
    return source;
  }

  interface Show {
    void accept(String type, String id, String data);
  }

  interface Note {
    void accept(Throwable error);
  }

  static void read(EventSource source, Show show, Note note) {
    // docs: okhttp-eventsource, read
    for (StreamEvent event : source.anyEvents()) {
      if (event instanceof MessageEvent message) {
        show.accept(message.getEventName(), message.getLastEventId(), message.getData());
      } else if (event instanceof FaultEvent fault) {
        note.accept(fault.getCause()); // it reconnects, also after 401 and 403
      }
    }
    // docs end
  }

  // docs: okhttp-sse
  abstract static class Follower extends EventSourceListener {
    final OkHttpClient client = new OkHttpClient.Builder().readTimeout(45, TimeUnit.SECONDS).build();
    final String url;
    String lastEventId;
    volatile boolean closed;

    Follower(String url) {
      this.url = url;
    }

    abstract void show(String type, String id, String data);

    abstract void note(Throwable error);

    void connect() {
      Request.Builder request = new Request.Builder().url(url).header("Accept", "text/event-stream");
      if (lastEventId != null) request.header("Last-Event-ID", lastEventId);
      EventSources.createFactory(client).newEventSource(request.build(), this);
    }

    @Override
    public void onEvent(okhttp3.sse.EventSource source, String id, String type, String data) {
      if (id != null) lastEventId = id;
      show(type, id, data); // type is null for a plain message
    }

    @Override
    public void onClosed(okhttp3.sse.EventSource source) { // the response was complete: a refusal
      reconnect();
    }

    @Override
    public void onFailure(okhttp3.sse.EventSource source, Throwable error, Response response) {
      note(error); // a status of 400, 401, 403 or 404 does not pass by itself: give up there
      reconnect();
    }

    void reconnect() {
      try {
        Thread.sleep(2000); // what retry: says is not shown
      } catch (InterruptedException stopped) {
        return;
      }
      if (!closed) connect();
    }
  }
  // docs end

  static AutoCloseable okhttpSse(Stream stream) {
    Follower follower = new Follower(stream.url()) {
      @Override
      void show(String type, String id, String data) {
        stream.event(type, id, data);
      }

      @Override
      void note(Throwable error) {
        stream.error(error);
      }
    };
    follower.connect();
    return () -> {
      follower.closed = true;
      follower.client.dispatcher().cancelAll();
    };
  }

  static String json(String text) {
    if (text == null) return "null";
    StringBuilder out = new StringBuilder("\"");
    for (char c : text.toCharArray()) {
      if (c == '"' || c == '\\' || c < ' ') out.append(String.format("\\u%04x", (int) c));
      else out.append(c);
    }
    return out.append('"').toString();
  }

  static synchronized void write(String line) {
    byte[] bytes = (line + "\n").getBytes(StandardCharsets.UTF_8);
    System.out.write(bytes, 0, bytes.length);
    System.out.flush();
  }

  /** A member of an order, none of which needs escapes. */
  static String member(String order, String name) {
    Matcher found = Pattern.compile("\"" + name + "\":\"([^\"]*)\"").matcher(order);
    return found.find() ? found.group(1) : null;
  }

  public static void main(String[] arguments) throws Exception {
    Map<String, AutoCloseable> open = new ConcurrentHashMap<>();
    write("{\"ready\":" + json(System.getProperty("java.version")) + "}");
    BufferedReader orders = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String order = orders.readLine(); order != null; order = orders.readLine()) {
      String close = member(order, "close");
      if (close != null) {
        open.remove(close).close();
        continue;
      }
      Stream stream = new Stream(member(order, "open"), member(order, "url"));
      boolean sse = member(order, "client").equals("okhttp-sse");
      open.put(stream.of(), sse ? okhttpSse(stream) : okhttpEventSource(stream));
    }
    System.exit(0);
  }
}
