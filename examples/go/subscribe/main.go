// Prints the data of each event of a filter: subscribe FILTER
package main

import (
	"bufio"
	"fmt"
	"log"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

type position struct {
	lastID string
	retry  time.Duration
}

// read hands over the events of one connection, until it ends.
func (p *position) read(target string, handle func(kind, data string)) error {
	request, err := http.NewRequest("GET", target, nil)
	if err != nil {
		return err
	}
	request.Header.Set("Accept", "text/event-stream")
	if p.lastID != "" {
		request.Header.Set("Last-Event-ID", p.lastID)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil
	}
	defer response.Body.Close()
	if response.StatusCode != 200 {
		return fmt.Errorf("%s", response.Status)
	}
	// Heartbeats come every 15 s: a connection that is silent for longer is dead.
	silence := time.AfterFunc(45*time.Second, func() { response.Body.Close() })
	defer silence.Stop()
	lines := bufio.NewScanner(response.Body)
	// An event has up to limits.event_bytes in one line.
	lines.Buffer(nil, 8<<20)
	kind, data := "message", []string{}
	for lines.Scan() {
		silence.Reset(45 * time.Second)
		field, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			kind = value
		case "data":
			data = append(data, value)
		case "id":
			p.lastID = value
		case "retry":
			if milliseconds, err := strconv.Atoi(value); err == nil {
				p.retry = time.Duration(milliseconds) * time.Millisecond
			}
		}
		if lines.Text() == "" {
			if len(data) > 0 {
				handle(kind, strings.Join(data, "\n"))
			}
			kind, data = "message", []string{}
		}
	}
	return nil
}

func main() {
	base := os.Getenv("TIDEGATE_URL")
	if base == "" {
		base = "http://127.0.0.1:8080"
	}
	target := base + "/events/" + url.PathEscape(os.Args[1]) + "?from=first"
	p := position{retry: 2 * time.Second}
	for {
		err := p.read(target, func(kind, data string) {
			switch {
			case kind == "tidegate.gap":
				fmt.Fprintln(os.Stderr, "missed events:", data)
			case !strings.HasPrefix(kind, "tidegate.") || kind == "tidegate.binary":
				fmt.Println(data)
			}
		})
		if err != nil {
			log.Fatal(err)
		}
		time.Sleep(p.retry)
	}
}
