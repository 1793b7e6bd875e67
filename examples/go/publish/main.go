// Publishes one event: publish SUBJECT DATA
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"time"
)

// publish returns the event's id. It retries with one idempotency key, so that the event is stored once.
func publish(url, subject, data string) (string, error) {
	key := make([]byte, 16)
	if _, err := rand.Read(key); err != nil {
		return "", err
	}
	client := http.Client{Timeout: 10 * time.Second}
	for attempt := 0; attempt < 5; attempt++ {
		request, err := http.NewRequest("POST", url+"/events/"+subject, strings.NewReader(data))
		if err != nil {
			return "", err
		}
		request.Header.Set("Idempotency-Key", hex.EncodeToString(key))
		if response, err := client.Do(request); err == nil {
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			if response.StatusCode == 201 {
				var receipt struct{ ID string }
				err := json.Unmarshal(body, &receipt)
				return receipt.ID, err
			}
			if response.StatusCode < 500 && response.StatusCode != 429 {
				return "", fmt.Errorf("%d: %s", response.StatusCode, body)
			}
		}
		time.Sleep(200 * time.Millisecond << attempt)
	}
	return "", fmt.Errorf("the event may or may not be stored")
}

func main() {
	url := os.Getenv("TIDEGATE_URL")
	if url == "" {
		url = "http://127.0.0.1:8080"
	}
	id, err := publish(url, os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(id)
}
