// Runs Go's SSE clients, each as its README has it, as many streams at once as it is told to. Reads and writes one JSON
// object a line, as tests/clients/drivers.rs has it; ends with its standard input.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"sync"
	"time"

	launchdarkly "github.com/launchdarkly/eventsource"
	r3labs "github.com/r3labs/sse/v2"
	gosse "github.com/tmaxmax/go-sse"
)

// What is read, and what is told of it.
type stream struct {
	of     string
	url    string
	ctx    context.Context
	client *http.Client
}

func (s *stream) event(kind, id, data string) {
	if kind == "" {
		kind = "message"
	}
	write(map[string]any{"of": s.of, "event": map[string]string{"type": kind, "id": id, "data": data}})
}

func (s *stream) error(err error) {
	write(map[string]any{"of": s.of, "error": fmt.Sprint(err)})
}

func (s *stream) end(text string) {
	if s.ctx.Err() == nil {
		write(map[string]any{"of": s.of, "end": text})
	}
}

// One subscription, as the README has it.
func r3labsOnce(s *stream) {
	client := r3labs.NewClient(s.url)
	client.Connection = s.client
	client.ReconnectNotify = func(err error, _ time.Duration) { s.error(err) }
	err := client.SubscribeRawWithContext(s.ctx, func(event *r3labs.Event) {
		s.event(string(event.Event), string(event.ID), string(event.Data))
	})
	s.end(fmt.Sprintf("SubscribeRaw returns %v", err))
}

func r3labsLoop(s *stream) {
	url, ctx, httpClient, note := s.url, s.ctx, s.client, s.error
	show := func(event *r3labs.Event) { s.event(string(event.Event), string(event.ID), string(event.Data)) }
	// docs: r3labs/sse
	client := r3labs.NewClient(url, r3labs.ClientMaxBufferSize(8<<20)) // an event of up to 8 MiB, as it is on the wire
	client.Connection = httpClient
	for ctx.Err() == nil {
		// Returns when a response ends, and after 15 minutes at the next error. The client keeps the last id.
		if err := client.SubscribeRawWithContext(ctx, show); err != nil {
			note(err)
		}
		time.Sleep(2 * time.Second)
	}
	// docs end
}

func goSSE(s *stream) {
	url, ctx, httpClient, note := s.url, s.ctx, s.client, s.error
	show := func(event gosse.Event) { s.event(event.Type, event.LastEventID, event.Data) }
	// docs: tmaxmax/go-sse
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		panic(err)
	}
	client := gosse.Client{HTTPClient: httpClient, OnRetry: func(err error, _ time.Duration) { note(err) }}
	connection := client.NewConnection(request)
	connection.Buffer(nil, 8<<20) // an event of up to 8 MiB; the default is 64 KiB
	connection.SubscribeToAll(show)
	err = connection.Connect() // reconnects, until the context ends, or a status is not 200
	// docs end
	s.end(fmt.Sprintf("Connect returns %v", err))
}

func launchDarkly(s *stream) {
	url, ctx, httpClient, note := s.url, s.ctx, s.client, s.error
	show := func(event launchdarkly.Event) {
		id := ""
		if with, ok := event.(launchdarkly.EventWithLastID); ok {
			id = with.LastEventID()
		}
		s.event(event.Event(), id, event.Data())
	}
	// docs: launchdarkly/eventsource
	source, err := launchdarkly.SubscribeWithURL(url,
		launchdarkly.StreamOptionHTTPClient(httpClient),
		launchdarkly.StreamOptionCanRetryFirstConnection(-1), // without it, the first connection is the only try
		launchdarkly.StreamOptionReadTimeout(45*time.Second)) // three heartbeats
	if err != nil {
		panic(err)
	}
	defer source.Close()
	for ctx.Err() == nil {
		select {
		case event := <-source.Events:
			show(event)
		case err := <-source.Errors:
			note(err)
		case <-ctx.Done():
		}
	}
	// docs end
}

var clients = map[string]func(*stream){
	"r3labs/sse once":          r3labsOnce,
	"r3labs/sse":               r3labsLoop,
	"tmaxmax/go-sse":           goSSE,
	"launchdarkly/eventsource": launchDarkly,
}

var writing sync.Mutex

func write(line any) {
	writing.Lock()
	defer writing.Unlock()
	text, err := json.Marshal(line)
	if err != nil {
		panic(err)
	}
	os.Stdout.Write(append(text, '\n'))
}

// An HTTP client that takes this certificate for good, and no other.
func httpClient(certificate string) *http.Client {
	if certificate == "" {
		return &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}
	}
	pem, err := os.ReadFile(certificate)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		panic(errors.New("no certificate"))
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	return &http.Client{Transport: transport}
}

func main() {
	open := map[string]context.CancelFunc{}
	write(map[string]string{"ready": runtime.Version()})
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		var order struct{ Open, Close, Client, URL, Certificate string }
		if err := json.Unmarshal(orders.Bytes(), &order); err != nil {
			panic(err)
		}
		if order.Close != "" {
			open[order.Close]()
			delete(open, order.Close)
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		open[order.Open] = cancel
		go clients[order.Client](&stream{order.Open, order.URL, ctx, httpClient(order.Certificate)})
	}
}
