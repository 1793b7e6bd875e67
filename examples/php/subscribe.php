<?php
// Prints the data of each event of a filter: php subscribe.php FILTER
declare(strict_types=1);

$url = (getenv('TIDEGATE_URL') ?: 'http://127.0.0.1:8080') . '/events/' . rawurlencode($argv[1]) . '?from=first';
$lastId = '';
$retry = 2000;

while (true) {
    $headers = "Accept: text/event-stream\r\n" . ($lastId === '' ? '' : "Last-Event-ID: $lastId\r\n");
    // Heartbeats come every 15 s: a connection that is silent for longer is dead.
    // HTTP/1.0, because PHP holds a chunked body back until a buffer is full.
    $http = ['header' => $headers, 'ignore_errors' => true, 'timeout' => 45, 'protocol_version' => 1.0];
    $context = stream_context_create(['http' => $http]);
    $stream = @fopen($url, 'r', false, $context);
    if ($stream !== false) {
        if ((int) explode(' ', $http_response_header[0])[1] !== 200) {
            fwrite(STDERR, stream_get_contents($stream));
            exit(1);
        }
        [$type, $data] = ['message', []];
        while (($line = fgets($stream)) !== false) {
            $line = rtrim($line, "\r\n");
            [$field, $value] = explode(':', $line, 2) + [1 => ''];
            $value = str_starts_with($value, ' ') ? substr($value, 1) : $value;
            if ($line === '') {
                if ($type === 'tidegate.gap') {
                    fwrite(STDERR, 'missed events: ' . implode("\n", $data) . "\n");
                } elseif ($data !== [] && (!str_starts_with($type, 'tidegate.') || $type === 'tidegate.binary')) {
                    echo implode("\n", $data), "\n";
                }
                [$type, $data] = ['message', []];
            } elseif ($field === 'event') {
                $type = $value;
            } elseif ($field === 'data') {
                $data[] = $value;
            } elseif ($field === 'id') {
                $lastId = $value;
            } elseif ($field === 'retry') {
                $retry = (int) $value;
            }
        }
        fclose($stream);
    }
    usleep($retry * 1000);
}
